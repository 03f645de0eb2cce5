"""The server's side of secure aggregation: four exchanges that end in a sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedraclora.aggregate import Uplinks
from fedraclora.downlink import opening_rows
from fedraclora.errors import ClientError, ConfigError, WireError
from fedraclora.method import Method
from fedraclora.privacy.secagg import LEAST, SecAgg
from fedraclora.tree import Tree
from fedraclora.wire.records import DTYPES
from fedraclora.wire.secagg import (
    LARGEST,
    Words,
    check_public,
    combine,
    own_mask,
    pair_mask,
    signed,
)
from strategies.server.exchange import Exchange
from strategies.server.rows import Row
from strategies.server.talk import Ask, Talk

SLACK = 1 + 1e-4  # of norms: updates are rounded to the wire's precision


@dataclass
class SecureSum:
    """Asks for the sum of a cohort, and sees nothing else of its updates.

    Attributes:
        config: Clip, neighbours, threshold, greatest weight.
        row: What the ledger says of the last sum.
    """

    config: SecAgg
    row: Row = field(default_factory=dict)

    def check(self, method: Method, weights: str, cohort: int) -> None:
        """Refuse what needs more than a sum.

        Raises:
            ConfigError: Saying why.
        """
        if cohort < LEAST:
            raise ConfigError(
                f"secure=secagg hides a client among {LEAST} or more, but a round asks {cohort}; "
                f"set cohort to {LEAST} or more, or secure=none"
            )
        traits = method.traits
        if not traits.linear:
            raise ConfigError(
                "secure=secagg gives the method a sum only, but this one needs each client's own "
                "update; choose another method, or secure=none"
            )
        if weights == "uniform" and self.config.max_weight != 1:
            raise ConfigError("under weights=uniform every weight is 1; set secure.max_weight=1")
        if weights != "uniform" and self.config.max_weight == 1:
            raise ConfigError(
                "weights is examples: set secure.max_weight to the most samples that a client may "
                "have, or weights=uniform"
            )

    def receive(self, ask: Ask, exchange: Exchange, base: Tree, clip: float) -> Uplinks:
        """Run the stages and give the sum.

        Args:
            ask: Sends messages and gives the replies that come.
            exchange: The train exchange, whose messages have been written.
            base: What clients train from.
            clip: The greatest norm of an update.

        Raises:
            ClientError: If too few clients stay, or the sum cannot be one of what they may send.
            ConfigError: If clients start apart.
        """
        if exchange.downlink.apart:
            raise ConfigError("secure=secagg needs all clients to train the same numbers")
        talk = Talk(exchange, ask)
        keys = talk.ask("keys", dict.fromkeys(exchange.cohort.clients.tolist()), check_keys)
        graph = self.config.graph(sorted(keys), exchange.loop.seed, exchange.round_)
        threshold = self.config.shares(min(map(len, graph.values()), default=0))
        told = {
            c: {"threshold": threshold, "keys": {str(n): keys[n] for n in graph[c]}} for c in graph
        }
        sealed = talk.ask("shares", told, check_shares)
        inbox: dict[int, Any] = {
            c: {str(n): sealed[n][str(c)] for n in graph[c] if n in sealed} for c in sealed
        }
        step = self.config.step(len(exchange.cohort), clip, LARGEST)
        settings = {"step": step, "max_weight": self.config.max_weight}
        words = talk.masked(inbox, settings | {"weights": exchange.loop.weights})
        asked = {
            c: {
                "alive": [int(n) for n in inbox[c] if int(n) in words],
                "gone": [int(n) for n in inbox[c] if int(n) not in words],
            }
            for c in words
        }
        shares = talk.ask("unmask", asked, check_unmask, used=True)
        total = unmasked(words, inbox, keys, shares, threshold)
        return self._checked(exchange, sorted(words), signed(total), step, clip, base, talk)

    def _checked(
        self,
        exchange: Exchange,
        clients: list[int],
        whole: torch.Tensor,
        step: float,
        clip: float,
        base: Tree,
        talk: Talk,
    ) -> Uplinks:
        """Check what can be checked on a sum, and give it."""
        K, weight = len(clients), int(whole[-1])
        update = whole[:-1].double() * step
        norm = float(update.norm())
        if not K <= weight <= K * self.config.max_weight or norm > weight * clip * SLACK:
            raise ClientError(
                f"round {exchange.round_}: the sum of {K} clients has the weight {weight} and the "
                f"norm {norm:.4g}; {K} to {K * self.config.max_weight} and at most "
                f"{weight * clip:.4g} are possible: some client sent what it may not"
            )
        itemsize = DTYPES[exchange.loop.dtype].itemsize
        exchange.received = K * len(whole) * 4 // itemsize
        self.row = {
            "clients": K,
            "step": step,
            "error_bound": K * step / 2 / weight,
            "up": talk.up,
            "down": talk.down,
        }
        ids = torch.tensor(clients, dtype=torch.int64)
        places = torch.searchsorted(exchange.cohort.clients, ids)
        start = opening_rows(exchange.downlink, base, exchange.layout, places)
        return Uplinks(
            ids,
            torch.full((K,), weight / K, dtype=torch.float64),
            exchange.layout,
            summed=start * weight + update,
            versions=torch.full_like(ids, exchange.version),
            places=places,
            denominator=float(weight),
        )


def unmasked(
    words: dict[int, Words],
    inbox: dict[int, Any],
    keys: dict[int, Any],
    shares: dict[int, Any],
    threshold: int,
) -> Words:
    """Add masked vectors and take off the masks that do not cancel.

    Args:
        words: The masked vector of each client in the sum.
        inbox: With whom each client shares masks: those who had sent it shares.
        keys: Public keys by client.
        shares: What clients gave of their neighbours' secrets.
        threshold: Shares that bring a secret back.

    Raises:
        ClientError: If too few shares came.
    """

    def secret(kind: str, owner: int) -> str:
        came = [said[kind][str(owner)] for said in shares.values() if str(owner) in said[kind]]
        if len(came) < threshold:
            raise ClientError(
                f"{len(came)} neighbours of client {owner} gave their shares; {threshold} are "
                "wanted to take its masks off: too many clients left"
            )
        return combine(came[:threshold])

    total = np.zeros_like(next(iter(words.values())))
    for client, row in words.items():
        total = total + row - own_mask(secret("alive", client), len(row))
    gone = {int(n) for told in inbox.values() for n in told} - words.keys()
    for client in sorted(gone):
        near = [c for c in words if str(client) in inbox[c]]
        scalar = secret("gone", client) if near else ""
        for other in near:  # what it would have added to take off its neighbour's mask
            mask = pair_mask(scalar, keys[other]["mask"], len(total), add=client > other)
            total = total + mask
    return total


def check_keys(told: Any, said: Any) -> None:
    """Refuse what are no public keys."""
    del told
    for name in ("mask", "box"):
        check_public(said[name])


def check_shares(told: Any, said: Any) -> None:
    """Refuse shares that are not for each neighbour once."""
    if {*said} != {*told["keys"]} or not all(isinstance(text, str) for text in said.values()):
        raise WireError(f"it sealed shares for {[*said]}, wanted are {[*told['keys']]}")


def check_unmask(told: Any, said: Any) -> None:
    """Refuse shares of others than was asked for."""
    for kind in ("alive", "gone"):
        if {*said[kind]} != {*map(str, told[kind])}:
            raise WireError(f"it gave shares of {[*said[kind]]}, wanted are {told[kind]}")
