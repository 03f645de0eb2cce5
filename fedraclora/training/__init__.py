"""Train many clients locally as one batch.

`cohort` trains a chunk of clients, step by step. `program`, `cohort_layers`, `adapted` and
`vmapped` make one model serve many clients; `feedforward` and `program` compute gradients;
`schedule`, `optimizer` and `precision` define a local step. `extra` says what a setting may add to
plain training; the additions are in `extras`, and no other module knows them. `memory` and
`chunking` decide how many clients fit. `tests/reference/client.py` is the same for one client,
written to be read.
"""
