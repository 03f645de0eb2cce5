"""What methods share, sorted by what their clients train.

`factored`: both factors; `drawn`: one factor under a drawing; `products`: an adapter as a product;
`common`: dense tensors beside the adapters, and how a round closes.
"""
