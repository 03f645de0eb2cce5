"""Building blocks that methods share.

`layerwise`: the loop over matrices, with `layer`, one of them as a method sees it; `factors`:
methods with a factor that is drawn, or with two that are trained; `initials`, `past`: where
factors begin; `common`: dense tensors beside them, and how a round closes.
"""
