"""Run the server-side parts of a round, the same for all methods.

`exchange` sends requests and checks replies (`guard`: those of untrusted clients),
`device_simulator` samples clients and finds stragglers, `round_step` defines the hooks of steps
(the steps are in `strategies.steps`), `rows` builds ledger rows, and `callbacks` may end the run.
`fedraclora.strategies.base` combines them.
"""
