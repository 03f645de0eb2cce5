"""What methods share, sorted by what their clients train.

`factored`: both factors; `asymmetric`: one factor under a drawing of the other; `drawn`: rank,
scale and drawings; `products`: an adapter as a product; `common`: dense tensors beside the
adapters, and how a round closes.
"""
