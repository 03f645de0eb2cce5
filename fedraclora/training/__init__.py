"""Local training of many clients as one batch.

`cohort` trains a chunk, step by step. Under it lies how a model is made to hold many clients
(`program`, `cohort_layers`, `adapted`, `vmapped`), where gradients come from
(`feedforward`, `program`), and what a step is (`schedule`, `optimizer`, `precision`).
What a setting may add to it is said by `extra`; those that there are stand in `extras`, which none
of these know.
`memory` and `chunking` say how many clients fit. The same for one client, written to be read, is
`tests/reference/client.py`.
"""
