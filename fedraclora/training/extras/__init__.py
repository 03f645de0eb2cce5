"""What may join plain local training, one file each: the core does not know them.

Those that a config names are given by `fedraclora.training.extras.settings.LocalSettings`; control
variates, which clients keep for an exchange that asks for them, by `variates`.
"""
