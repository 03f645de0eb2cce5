"""Mixed devices on a virtual clock.

`distributions` says in what devices differ and when a client can be asked, `timeline` how one round
goes, and `system` puts the two together for the rounds of a run.
"""
