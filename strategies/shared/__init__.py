"""What methods share.

`layerwise`: the loop over matrices, with `layer`, one of them as a method sees it; `drawn`: methods
with a factor that is drawn; `factored`: with two that are trained; `gradient_first`, `initials`,
`past`: where factors begin; `common`: dense tensors beside them, and how a round closes.
"""
