"""Which local settings and which privacy go with what a method asks of its clients."""

from __future__ import annotations

import torch

from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel, Privacy
from fedraclora.protocol.method import Cohort, Draw, Method, State
from fedraclora.protocol.recipes import RECIPES
from fedraclora.training.localconfig import LocalConfig


def check_fits(
    method: Method, state: State, local: LocalConfig, privacy: Privacy, draw: Draw
) -> None:
    """Refuse what would move, or remember, entries that the method means to be left alone.

    Args:
        method: The method.
        state: Before its first round.
        local: Local settings.
        privacy: What a round may tell of a client.
        draw: The method's randomness.

    Raises:
        ConfigError: Saying why, and what to take.
    """
    if method.traits.varies and (local.moments == "run" or local.moments_kept):
        key = "moments_kept" if local.moments_kept else "moments"
        raise ConfigError(
            f"local.{key} is {getattr(local, key)}, but with this method clients train other "
            "tensors from round to round, so that moments of the last are none of the next; set "
            "local.moments to round, or to link, and local.moments_kept to 0"
        )
    sent = method.open_round(state, 1, Cohort(torch.arange(2), torch.ones(2)), draw)
    if not RECIPES[sent.recipe].fixes:
        return
    if isinstance(privacy, ClientLevel):
        raise ConfigError(
            "privacy=client_level adds noise to every number that is sent, but with this method "
            "some of them are never trained and must stay as they are; take another method, or "
            "privacy=none"
        )
    if local.weight_decay and not sent.adapters:  # of factors, what is fixed is zero
        raise ConfigError(
            f"local.weight_decay is {local.weight_decay}, but this method trains a share of the "
            "entries of full weights, and decay would move the others; set it to 0"
        )
