"""Let the owner of a node's data approve runs, limit them, and see what came and went.

``fedraclora node`` puts this into the SuperNode's own process: the code of a run, which comes from
its operator, runs in other processes and cannot change it.
"""
