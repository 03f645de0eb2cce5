"""Protect clients and samples: differential privacy and secure aggregation.

`client_level` hides whether a client took part, `sample_level` protects one sample of a client
(`local_dp` is its oracle), `accountant` computes epsilon for both, `secagg` has the settings of
secure aggregation, and `secret` draws noise and masks. The package works on tensors and knows no
method.
"""
