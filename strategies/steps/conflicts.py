"""What does not go together: one table, for the errors and for the page that prints it.

A row names two of the `strategies.steps.features` and says why they do not go together; what to
take instead the features say. A row is looked at before the first round, and in each round where
what is sent may change; some are raised by the step that finds them when it computes.
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
        """Whether it may come up in any round."""
        return self.what in IN_ROUNDS or self.beside in IN_ROUNDS

    @property
    def instead(self) -> str:
        """What to take: something else than the one, or than the other."""
        return f"{FEATURES[self.beside].other}, or {FEATURES[self.what].other}"

    def check(self, setup: Setup) -> None:
        """Refuse a run that has both.

        Raises:
            ConfigError: Saying why, and what to take.
        """
        what, beside = FEATURES[self.what].found(setup), FEATURES[self.beside].found(setup)
        if what and beside:
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
BUFFER, SECURE, PRIVATE = "system.buffer", "secure=secagg", "privacy=client_level"
VARIATES, DRIFTS = "control_variates=true", "gradients of two rounds have no coordinates in common"
WEIGHTS, FACTORS = "server_optimiser.space=weights", "server_optimiser.space=factors"
ADAPTIVE = "an adaptive server_optimiser with space=factors"
OTHER_RULE, SINGLE_RULE = "another aggregator than mean", "a rule that looks at single updates"
COLLUDING, SUM = "an attack whose clients collude", "the server gets a sum alone"
STARTS = "other factors to start from at each client"
APART, NO_PLACE = "other things to train at each client", "their mean has no one start"
MIXES, ONCE = "it mixes replies of several rounds", "privacy is accounted for one exchange a round"

CONFLICTS = tuple(Conflict(what, beside, why) for what, beside, why in (
    ("a rule that makes one vector of a cohort", SINGLE, "it hands on that vector alone"),
    ("a rule that compares clients", APART, "numbers that mean different things are not compared"),
    ("engine=deploy", "an attack", "attacks are for simulations, and real clients need no leave"),
    ("a method that trains other tensors from round to round", "local moments that live on",
        "moments of the last round are none of the next"),
    ("a method that trains a share of the entries of full weights", "local.weight_decay",
        "decay would move the others"),
    # ---- Server optimisers ----
    (WEIGHTS, STAYS, "each client has weights of its own, and the server none"),
    (WEIGHTS, "dora=true", "what is added to a base weight is not added to the effective one"),
    (FACTORS, SINGLE, "it steps by the mean of their factors"),
    (FACTORS, "a method whose clients send gradients first",
        "by them the method chooses what they train"),
    (FACTORS, "a method whose factors begin anew with each link", "so would their moments"),
    (ADAPTIVE, "a method whose factors stand beside others in each link",
        "it scales coordinates one by one, and these change with the frozen factors"),
    (ADAPTIVE, "a method whose frozen factors have changed",
        "it scales coordinates one by one, and these have changed, too"),
    (FACTORS, STARTS, NO_PLACE),
    # ---- Control variates ----
    (VARIATES, PRIVATE,
        "it adds noise, which no client knows of, and which would add up in the server's variate"),
    (VARIATES, SINGLE_RULE,
        "it changes or leaves out updates of which clients keep variates as they sent them"),
    (VARIATES, "local epochs in the place of steps",
        "the server knows the mean gradient by the one number of steps that all clients take"),
    (VARIATES, "local steps that are not plain SGD", "their sum does not tell the mean gradient"),
    (VARIATES, STAYS, DRIFTS),
    (VARIATES, SINGLE, f"its server refits factors, so that {DRIFTS}"),
    (VARIATES, "a round without a mean gradient", "the variates are mean gradients"),
    (VARIATES, "a method whose trained factors begin anew",
        "their gradients tell nothing of the next, unless a shared factor stands beside them"),
    # ---- Secure aggregation, and privacy of clients ----
    (SECURE, SINGLE_RULE, SUM),
    (SECURE, COLLUDING, SUM),
    (SECURE, "a cohort of two or less", "it hides a client among 3 or more"),
    (SECURE, SINGLE, SUM),
    ("secure.max_weight above 1", "weights=uniform", "under it every weight is 1"),
    ("secure.max_weight=1", "weights=examples", "clients weigh as much as they have samples"),
    (SECURE, APART, "what is added up must be the same numbers"),
    (PRIVATE, "system", "it draws its cohorts itself"),
    (PRIVATE, OTHER_RULE, "it takes the mean itself, whose sensitivity it knows"),
    ("privacy.quantile", SECURE, "it counts short updates one by one, which a sum hides"),
    (PRIVATE, SINGLE, "it gives the noisy mean alone"),
    (PRIVATE, "a method some of whose numbers are never trained",
        "it adds noise to all numbers that are sent, and these must stay as they are"),
    (PRIVATE, "weights=examples", "under it clients count alike"),
    (PRIVATE, STARTS, NO_PLACE),
    (PRIVATE, TWICE, ONCE),
    (SECURE, TWICE, ONCE),
    ("local.dp", TWICE, ONCE),
    # ---- Rounds that wait for nobody ----
    (BUFFER, SINGLE, MIXES),
    (BUFFER, STAYS, MIXES),
    (BUFFER, OTHER_RULE, MIXES),
    (BUFFER, COLLUDING, MIXES),
    (BUFFER, SECURE, MIXES),
    (BUFFER, VARIATES, MIXES),
    (BUFFER, "an allocation of ranks", MIXES),
    (BUFFER, FACTORS, MIXES),
    (BUFFER, APART, MIXES),
    (BUFFER, "clients that send gradients", MIXES),
))
# fmt: on


def refused(what: str, beside: str, found: bool | str = True) -> ConfigError:
    """Build the error of a row that a step has come upon; ``found`` names the value."""
    row = next(row for row in CONFLICTS if (row.what, row.beside) == (what, beside))
    return row.error(found)
