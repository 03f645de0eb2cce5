"""``fedraclora theory``: measured curves of convex problems beside the bounds on them.

Nothing is imported here: a worker process that unpickles a case needs no figures.
"""
