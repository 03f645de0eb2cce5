"""What does not go together: one table, for the errors and for the page that prints it.

It says of pairs of `strategies.steps.features` why they do not go together; what to take instead
the features say. A pair is looked at before the first round, and in each round where what is sent
may change; some are refused by the step that comes upon them when it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.errors import ConfigError
from strategies.steps.features import FEATURES, IN_ROUNDS, Setup


@dataclass(frozen=True)
class Conflict:
    """Two things that do not go together.

    Attributes:
        what, beside: Their names, keys of `FEATURES`.
        why: The reason.
    """

    what: str
    beside: str
    why: str

    @property
    def in_rounds(self) -> bool:
        """Return whether it may come up in any round."""
        return self.what in IN_ROUNDS or self.beside in IN_ROUNDS

    @property
    def instead(self) -> str:
        """What to take: something else than the one, or than the other."""
        return f"{FEATURES[self.beside].other}, or {FEATURES[self.what].other}"

    def check(self, setup: Setup) -> None:
        """Reject a run that has both.

        Raises:
            ConfigError: Saying why, and what to take.
        """
        if (what := FEATURES[self.what].found(setup)) and (
            beside := FEATURES[self.beside].found(setup)
        ):
            raise self.error(what, beside)

    def error(self, *found: bool | str) -> ConfigError:
        """Build the error; ``found`` are the values that were met, where there are several."""
        met = ", ".join(value for value in found if isinstance(value, str))
        return ConfigError(
            f"{self.what} does not go with {self.beside}{met and f' ({met})'}: {self.why}; "
            f"take {self.instead}"
        )


# fmt: off
SINGLE = "a method that needs each client's own update"
STAYS = "a method of which a part stays at each client"
TWICE = "a method that asks twice in a round"
ROW_MOMENTS = "local.moments=rows"
SECURE, PRIVATE, VARIATES = "secure=secagg", "privacy=client_level", "control_variates=true"
FACTORS = "server_optimiser.space=factors"
ADAPTIVE = "an adaptive server_optimiser with space=factors"
OTHER_RULE, SINGLE_RULE = "another aggregator than mean", "a rule that looks at single updates"
COLLUDING, GRADIENTS = "an attack whose clients collude", "clients that send gradients"
APART = "other things to train at each client"
STARTS, NO_PLACE = "other factors to start from at each client", "their mean has no one start"
POOL = "a method with a pool of sketches"
DRIFTS = "gradients of two rounds have no coordinates in common"

WHY = {
    "a rule that makes one vector of a cohort": {SINGLE: "it hands on that vector alone"},
    "a rule that compares clients": {APART: "unlike numbers cannot be compared"},
    "engine=deploy": {
        "an attack": "attacks are for simulations, and real clients need no leave"},
    "local moments that live on": {
        "a method that trains other tensors from round to round":
            "moments of the last round are none of the next"},
    "local.weight_decay": {
        "a method that trains a share of the entries of full weights":
            "decay would move the others"},
    "local.prox": {"dora=true": "a weight is no sum of the base and a low-rank term"},
    "server_optimiser.space=weights": {
        STAYS: "each client has weights of its own, and the server none",
        "dora=true": "what is added to a base weight is not added to the effective one"},
    FACTORS: {
        SINGLE: "it steps by the mean of their factors",
        "a method whose clients send gradients first": "by them it chooses what they train",
        "a method whose factors begin anew with each link": "so would their moments",
        STARTS: NO_PLACE},
    ADAPTIVE: {
        "a method whose factors stand beside others in each link":
            "it scales coordinates one by one, and these change with the frozen factors",
        "a method whose frozen factors have changed":
            "it scales coordinates one by one, and these have changed, too"},
    VARIATES: {
        PRIVATE: "its noise, which no client knows of, would add up in the server's variate",
        SINGLE_RULE: "it changes or leaves out updates of which clients keep variates as they are",
        "local epochs in the place of steps":
            "the server knows the mean gradient by the one number of steps that all clients take",
        "local steps that are not plain SGD": "their sum does not tell the mean gradient",
        STAYS: DRIFTS,
        SINGLE: f"its server refits factors, so that {DRIFTS}",
        "a round without a mean gradient": "the variates are mean gradients",
        "a method whose trained factors begin anew":
            "their gradients tell nothing of the next, unless a shared factor stands beside them"},
    SECURE: {
        **dict.fromkeys((SINGLE_RULE, COLLUDING, SINGLE), "the server gets a sum alone"),
        "a cohort of two or less": "it hides a client among 3 or more",
        APART: "what is added up must be the same numbers",
        "wire.uplink in fewer bits": "its clients round their updates already, to common steps"},
    ROW_MOMENTS: {
        PRIVATE: "its noise would drown squares of gradients, which are small and never negative",
        SECURE: "squares of gradients are smaller than the steps of its sums",
        **dict.fromkeys(("wire.uplink in fewer bits", "wire.downlink in fewer bits"),
            "what rounds to zero is divided by"),
        FACTORS: "it would step in second moments, too",
        APART: "the mean over a row has parts that a client does not train",
        TWICE: "only the first exchange has them",
        "system.buffer": "replies of several rounds have seen other squares",
        "a method that trains neither factor A nor B": "there are no rows"},
    "secure.max_weight above 1": {"weights=uniform": "under it every weight is 1"},
    "secure.max_weight=1": {"weights=examples": "clients weigh as much as they have samples"},
    PRIVATE: {
        "system": "privacy draws its cohorts itself",
        OTHER_RULE: "privacy takes the mean itself, whose sensitivity it knows",
        SINGLE: "privacy gives the noisy mean alone",
        "a method some of whose numbers are never trained":
            "noise is added to all numbers that are sent, and these must stay as they are",
        "weights=examples": "under privacy clients count alike",
        STARTS: NO_PLACE},
    "privacy.quantile": {SECURE: "it counts short updates one by one, which a sum hides"},
    TWICE: dict.fromkeys((PRIVATE, SECURE, "local.dp"),
        "privacy is accounted for one exchange a round"),
    "system.buffer": dict.fromkeys((SINGLE, STAYS, OTHER_RULE, COLLUDING, SECURE, VARIATES,
        "an allocation of ranks", FACTORS, APART, GRADIENTS, POOL),
        "it mixes replies of several rounds"),
}
# fmt: on
CONFLICTS = tuple(
    Conflict(what, beside, why) for what, row in WHY.items() for beside, why in row.items()
)


def refused(what: str, beside: str, found: bool | str = True) -> ConfigError:
    """Build the error of a pair that a step has come upon; ``found`` names the value."""
    return Conflict(what, beside, WHY[what][beside]).error(found)
