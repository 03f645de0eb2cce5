"""Encoders: what a source has, as tensors of samples; later rows are read by the same."""
