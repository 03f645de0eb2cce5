"""Mixed devices on a virtual clock.

`availability` says when a client can be asked, `distributions` in what devices differ, `timeline`
how one round goes, and `system` puts the three together for the rounds of a run.
"""
