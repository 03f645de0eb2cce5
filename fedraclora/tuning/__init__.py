"""Tuning on a user's own task: metric against bytes, by Optuna, on a validation split."""
