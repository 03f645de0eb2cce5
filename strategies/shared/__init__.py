"""Provide building blocks that methods share.

`layerwise`: the loop over matrices, with `layer`, a method's view of one; `factors`: methods with
one drawn factor, or with two trained ones; `initials`, `past`: initialization of factors; `common`:
dense tensors beside them, and the end of a round.
"""
