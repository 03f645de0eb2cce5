"""Clients that do harm, and what holds against them.

`statistics` are the robust means, `rules` makes aggregators of them, `attack` is what harmful
clients send in a simulation, and `attacked` trains a cohort that has some.
"""
