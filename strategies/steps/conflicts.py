"""What does not go together: one table, for the errors and for the page that prints it.

A row names two of the `strategies.steps.features`, why they do not go together, and what to do. It
is looked at before the first round, and in each round where what is sent may change.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.errors import ConfigError
from strategies.steps.features import FEATURES, IN_ROUNDS, Setup


@dataclass(frozen=True)
class Conflict:
    """Two things that do not go together.

    Attributes:
        what, beside: Their names: keys of `FEATURES`, or what a step finds when it computes.
        why: The reason.
        instead: What to do.
    """

    what: str
    beside: str
    why: str
    instead: str

    @property
    def in_rounds(self) -> bool:
        """Whether it may come up in any round."""
        return not IN_ROUNDS.keys().isdisjoint({self.what, self.beside})

    def check(self, setup: Setup) -> None:
        """Refuse a run that has both.

        Raises:
            ConfigError: Saying why, and what to do.
        """
        if (what := FEATURES[self.what](setup)) and (beside := FEATURES[self.beside](setup)):
            raise self.error(what, beside)

    def error(self, *found: bool | str) -> ConfigError:
        """Build the error; ``found`` are the values that were met, where there are several."""
        met = ", ".join(value for value in found if isinstance(value, str))
        return ConfigError(
            f"{self.what} does not go with {self.beside}{met and f' ({met})'}: {self.why}; "
            f"{self.instead}"
        )


# fmt: off
SINGLE = "a method that needs each client's own update"
STAYS = "a method of which a part stays at each client"
SECURE, PRIVATE, VARIATES = "secure=secagg", "privacy=client_level", "control_variates=true"
WEIGHTS, FACTORS = "server_optimiser.space=weights", "server_optimiser.space=factors"
BUFFER, MIXES = "system.buffer", "it mixes replies of several rounds"
NO_VARIATES = "or set control_variates=false"
NO_FACTORS = "take server_optimiser.space=weights, or server_optimiser=none"
NO_BUFFER = "or set system.buffer=null"
PUBLIC, OPEN = "or set privacy=none", "or set secure=none"

ONCE = Conflict("a later exchange in the same round",
    "privacy=client_level, local.dp or secure=secagg",
    "privacy is accounted for one exchange a round",
    "take another method, or privacy=none, local.dp=null and secure=none")
NOT_MOVED = Conflict("an adaptive server_optimiser with space=factors",
    "factors beside others that have changed", "it scales coordinates one by one",
    f"take server_optimiser=momentum, or {NO_FACTORS}")
BEGIN_ANEW = Conflict(VARIATES, "factors that begin anew",
    "their gradients tell nothing of those of the next round",
    f"take a method that trains one factor beside a shared one, {NO_VARIATES}")

CONFLICTS = (
    # ---- Robust rules and attacks ----
    Conflict("a rule that makes one vector of a cohort", SINGLE, "it hands on that vector alone",
        "take aggregator=multi_krum, krum, norm_bound or mean"),
    Conflict("a rule that compares clients", "other things to train at each client",
        "their numbers mean different things (system.rank_budget, method.sketches above 1, "
        "factors of their own)", "take aggregator=norm_bound or mean"),
    Conflict("engine=deploy", "an attack",
        "attacks are for simulations, and real clients need nobody's leave", "set attack=none"),
    # ---- Local settings ----
    Conflict("a method that trains other tensors from round to round", "local moments that live on",
        "moments of the last round are none of the next",
        "set local.moments to round, or to link, and local.moments_kept to 0"),
    Conflict("a method that trains a share of the entries of full weights", "local.weight_decay",
        "decay would move the others", "set it to 0"),
    # ---- Server optimisers ----
    Conflict(WEIGHTS, STAYS, "each client has weights of its own, and the server none",
        f"take {FACTORS}"),
    Conflict(WEIGHTS, "dora=true",
        "what is added to a base weight is not added to the effective one", f"take {FACTORS}"),
    Conflict(FACTORS, SINGLE, "it steps by the mean of their factors", NO_FACTORS),
    Conflict(FACTORS, "a method whose clients send gradients first",
        "by them the method chooses what they train", NO_FACTORS),
    Conflict(FACTORS, "factors that begin anew with each link", "so would their moments",
        NO_FACTORS),
    Conflict("an adaptive server_optimiser with space=factors",
        "factors beside others that change with each link", NOT_MOVED.why, NOT_MOVED.instead),
    Conflict(FACTORS, "clients that start from factors of their own",
        "the step has no one place to start from", NO_FACTORS),
    # ---- Control variates ----
    Conflict(VARIATES, PRIVATE,
        "it adds noise to the mean from which the server's variate is formed; no client knows "
        "that noise, so it would add up in the correction from round to round",
        f"take privacy=none, {NO_VARIATES}"),
    Conflict(VARIATES, "a robust rule",
        "it changes or leaves out updates when they have arrived; clients keep variates of what "
        "they sent, so the correction would point to what the server has cut away",
        f"take aggregator=mean (a clip at the clients is that of secure=secagg), {NO_VARIATES}"),
    Conflict(VARIATES, "local epochs in the place of steps",
        "the server knows the mean gradient by the one number of steps that all clients take",
        f"set local.steps, 1 or more, {NO_VARIATES}"),
    Conflict(VARIATES, "local steps that are not plain SGD",
        "the mean gradient cannot be told from their sum",
        f"leave it out (local=sgd), {NO_VARIATES}"),
    Conflict(VARIATES, STAYS, "gradients of two rounds have no coordinates in common",
        f"take a method with one shared mean, {NO_VARIATES}"),
    Conflict(VARIATES, SINGLE,
        "its server refits factors, so that gradients of two rounds have no coordinates in common",
        f"take a method with one shared mean, {NO_VARIATES}"),
    Conflict(VARIATES, "a round without a mean gradient", "the variates are mean gradients",
        f"take another method or system.rank_budget=null, {NO_VARIATES}"),
    # ---- Secure aggregation ----
    Conflict(SECURE, "a rule or an attack that looks at single updates",
        "the server gets their sum alone", f"take aggregator=mean and another attack, {OPEN}"),
    Conflict(SECURE, "a cohort of two or less", "it hides a client among 3 or more",
        f"set cohort to 3 or more, {OPEN}"),
    Conflict(SECURE, SINGLE, "the server gets their sum alone", f"take another method, {OPEN}"),
    Conflict("secure.max_weight above 1", "weights=uniform", "under it every weight is 1",
        "set secure.max_weight=1"),
    Conflict("secure.max_weight=1", "weights=examples",
        "clients weigh as much as they have samples",
        "set secure.max_weight to the most samples that a client may have, or weights=uniform"),
    Conflict(SECURE, "other things to train at each client",
        "only what all clients train can be added",
        f"take another method or system.rank_budget=null, {OPEN}"),
    # ---- Privacy of clients ----
    Conflict(PRIVATE, "system", "it draws its cohorts itself", f"set system=none, {PUBLIC}"),
    Conflict(PRIVATE, "another aggregator than mean",
        "it takes the mean itself, whose sensitivity it knows", f"set aggregator=mean, {PUBLIC}"),
    Conflict("privacy.quantile", SECURE, "it counts short updates one by one, which a sum hides",
        f"set it to null, {OPEN}"),
    Conflict(PRIVATE, SINGLE, "it gives the noisy mean alone", f"take another method, {PUBLIC}"),
    Conflict(PRIVATE, "a method some of whose numbers are never trained",
        "it adds noise to every number that is sent, and these must stay as they are",
        f"take another method, {PUBLIC}"),
    Conflict(PRIVATE, "weights=examples", "under it clients count alike", "set weights=uniform"),
    Conflict(PRIVATE, "clients that start from factors of their own",
        "the sum of their updates has no one place to start from",
        f"take another method, {PUBLIC}"),
    # ---- Rounds that wait for nobody ----
    Conflict(BUFFER, SINGLE, MIXES, f"take another method, {NO_BUFFER}"),
    Conflict(BUFFER, STAYS, MIXES, f"take another method, {NO_BUFFER}"),
    Conflict(BUFFER, "another aggregator than mean", MIXES, f"set aggregator=mean, {NO_BUFFER}"),
    Conflict(BUFFER, "an attack whose clients collude", MIXES, f"take another attack, {NO_BUFFER}"),
    Conflict(BUFFER, SECURE, f"{MIXES}, masked for several sums", f"set secure=none, {NO_BUFFER}"),
    Conflict(BUFFER, VARIATES, f"{MIXES}, corrected by several variates",
        f"set control_variates=false, {NO_BUFFER}"),
    Conflict(BUFFER, "an allocation of ranks", f"{MIXES}, in which other layers may be trained",
        f"set allocation=none, {NO_BUFFER}"),
    Conflict(BUFFER, FACTORS, f"{MIXES}, of several factors", NO_FACTORS),
    Conflict(BUFFER, "a method that asks other things of each client, or twice in a round", MIXES,
        f"take another method, {NO_BUFFER}"),
)
# fmt: on
FOUND_BY_STEPS = (ONCE, NOT_MOVED, BEGIN_ANEW)


def once_a_round(*, first: bool) -> None:
    """Refuse another exchange in a round, which would cost as much privacy again.

    Raises:
        ConfigError: Unless it is the first.
    """
    if not first:
        raise ONCE.error()
