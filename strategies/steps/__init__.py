"""What may happen to a round besides its method, one step in one file.

A step is a `strategies.server.round_step.RoundStep` and overrides the hooks that it needs; `order`
makes the list from the settings of a run, in the order in which updates pass it, and `conflicts` is
the table of what does not go together. The strategy knows the hooks and none of the steps.
"""
