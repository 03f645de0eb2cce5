"""Provide optional additions to plain local training, one file each; the core does not know them.

`fedraclora.training.extras.settings.LocalSettings` creates those that a config names. Control
variates, which clients keep if an exchange asks for them, come from `variates`.
"""
