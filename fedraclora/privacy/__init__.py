"""Privacy: what is told of a client, at what price, and what nobody but its owner can foresee.

`client_level` protects that a client took part, `sample_level` protects one sample of a client
(`local_dp` is its oracle), `accountant` says what either costs, `secagg` settles how sums are
masked, and `secret` is where noise and masks come from. It knows tensors alone, no method.
"""
