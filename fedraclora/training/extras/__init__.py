"""What may join plain local training, one file each: the core does not know them.

Those that a config names are given by `fedraclora.training.extras.settings.LocalSettings`.
"""

from __future__ import annotations

from fedraclora.training.extra import Keeper
from fedraclora.training.extras.variates import VariateKeeper

# What clients keep for an exchange that asks for it, whatever their local settings are.
KEEPERS: tuple[Keeper, ...] = (VariateKeeper(),)
