"""Check across groups of the config: keys without effect, and values that contradict each other.

A key at its default is always allowed: the files of `conf` list the keys of their group. A user who
set a key to another value expects an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from fedraclora.allocation import Uniform
from fedraclora.attacks import Attack
from fedraclora.binding import Plain, without
from fedraclora.config.settings import StopConfig
from fedraclora.config.table_rows import TableRow
from fedraclora.data.own_loss import is_own, named_loss, short_name
from fedraclora.errors import ConfigError, UnreadKeysError, nearest, unknown
from fedraclora.evaluation.metrics import MEASURED, PERSONAL
from fedraclora.protocol.cohorts import cohort_size
from fedraclora.protocol.method import Method
from fedraclora.renamed import renamed
from fedraclora.training.extras.settings import LocalSettings

if TYPE_CHECKING:
    from fedraclora.config.run_config import RunConfig


@dataclass(frozen=True)
class Rule:
    """Define keys of a group, and the condition under which they have an effect.

    Attributes:
        keys: Their paths.
        read: Whether they have an effect.
        reader: What reads them, for messages.
    """

    keys: Collection[str]
    read: Callable[[RunConfig], bool]
    reader: str


# Keys passed to a user's training function, among them the step sizes' scale over rounds.
READ_BY_OWN = {
    "lr",
    "train",
    "parameters",
    "timeout",
    "schedule",
    "warmup",
    "restart_every",
    "final",
} | {
    "step_every",
    "step_factor",
}
UNEQUAL = "sizes that are not constant (lognormal, pareto)"
RULES = (
    Rule(
        [f"local.{field.name}" for field in fields(LocalSettings) if field.name not in READ_BY_OWN],
        lambda c: not c.local.is_own,
        "the built-in training loop, but with local=own your function trains instead",
    ),
    Rule(
        ["engine.chunk"],
        lambda c: not c.local.is_own or c.engine.chunk == 1,
        "batches of clients, but with local=own your function trains one client at a time",
    ),
    Rule(["local.epochs"], lambda c: c.local.steps is None, "local.steps=null"),
    Rule(["local.damping"], lambda c: c.local.adjust != "none", "local.adjust"),
    Rule(
        ["local.min_lr_ratio"],
        lambda c: c.local.schedule in {"cosine", "linear"},
        "local.schedule=cosine and linear",
    ),
    Rule(
        ["local.step_every", "local.step_factor"],
        lambda c: c.local.schedule == "step",
        "local.schedule=step",
    ),
    Rule(
        ["local.optimizer_state_kept"],
        lambda c: links_end(c.method, c.allocation),
        "methods that merge (method.merge_every), but this one never does",
    ),
    Rule(
        ["local.full_lr"],
        lambda c: c.head in {"full", "personal"} or c.bias == "full" or bool(c.modules_to_save),
        "layers trained in full (head=full, head=personal, bias=full, modules_to_save)",
    ),
    Rule(
        ["pretrain.labels", "pretrain.lr", "pretrain.batch_size"],
        lambda c: c.pretrain.epochs > 0,
        "pretrain.epochs above 0 (pretrain=none leaves all of it out)",
    ),
    Rule(
        ["attack.share"],
        lambda c: type(c.attack) is not Attack,
        "attacks, but attack=none has none",
    ),
    Rule(
        ["evaluate.sample"],
        lambda c: c.head == "personal" or c.method.client_state,
        "head=personal and methods that leave a part at each client",
    ),
    Rule(
        ["evaluate.share", "evaluate.clients_every", "evaluate.personal"],
        lambda c: c.evaluate.by_clients,
        "clients that measure (evaluate.clients=round and all)",
    ),
    Rule(
        ["evaluate.min_clients"],
        lambda c: c.evaluate.by_clients and c.veiled,
        "clients that measure under secure=secagg or privacy=client_level",
    ),
    Rule(
        ["privacy.measure_noise", "privacy.measure_bound"],
        lambda c: c.evaluate.by_clients,
        "clients that measure (evaluate.clients=round and all)",
    ),
    Rule(
        ["evaluate.answers", "evaluate.new_tokens", "evaluate.shown"],
        lambda c: c.evaluate.generate is not None,
        "evaluate.generate",
    ),
    Rule(["data.choices"], lambda c: c.evaluate.choices is not None, "evaluate.choices"),
    Rule(["partition.spread"], lambda c: unequal(c.partition.group), UNEQUAL),
    Rule(["data.spread"], lambda c: unequal(c.data.group), UNEQUAL),
    Rule(
        [f"stop.{field.name}" for field in fields(StopConfig) if field.name != "patience"],
        lambda c: c.stop.patience is not None,
        "stop.patience",
    ),
)


def as_read(plain: Plain) -> dict[str, object]:
    """Remove from a config the keys that have no effect with local=own."""
    local, engine = (plain.get(key) for key in ("local", "engine"))
    if not isinstance(local, Mapping) or local.get("train") is None:
        return dict(plain)
    kept = {key: value for key, value in local.items() if key in {"name", *READ_BY_OWN}}
    found = {**plain, "local": kept}
    return found | ({"engine": without(engine, "chunk")} if isinstance(engine, Mapping) else {})


def unequal(group: Mapping[str, object]) -> bool:
    """Return whether clients on demand have different numbers of samples."""
    return group.get("sizes") != "constant"


def links_end(method: Method, allocation: Uniform) -> bool:
    """Return whether a method ever merges its update and starts new factors."""
    if type(allocation) is not Uniform:  # components are cut, so that the remaining ones differ
        return True
    return method.link_rounds is not None


def said(config: RunConfig, group: str) -> tuple[Mapping[str, object], dict[str, object]]:
    """Return the settings of a group, and their defaults."""
    settings = getattr(config, group)
    if isinstance(settings, TableRow):
        return settings.group, settings.defaults
    return vars(settings), {field.name: field.default for field in fields(settings)}


def refuse_unknown(plain: Plain, known: Collection[str]) -> None:
    """Reject keys of the config itself that do not exist.

    Raises:
        UnreadKeysError: Naming them, and the nearest that are known.
    """
    if not (found := [key for key in plain if key not in known]):
        return
    groups = {key: group for key in known if isinstance(group := plain.get(key), Mapping)}
    whole = [f"{key}.{inner}" for key, group in groups.items() for inner in group]
    lines = [unknown_key(str(key), [*known, *whole]) for key in found]
    if "experiment" in found:
        lines.append("the first line of a preset of your own is '# @package _global_'")
    raise UnreadKeysError("\n  ".join(lines), found)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Build the error for an unknown key, with its new name or the nearest key."""
    if moved := renamed(key):
        return moved
    group = key.rpartition(".")[0].partition(".")[0]
    known = [*known]
    inside = [other for other in known if other.startswith(f"{group}.")]
    known = inside if group and inside else known  # of a group that exists its own keys are meant
    near = " or ".join(map(repr, nearest(key, known, count=2)))
    return (
        f"unknown key {key!r}{f'; did you mean {near}?' if near else '.'} `fedraclora simulate "
        "--cfg job` prints all keys"
    )


def refuse_unread(config: RunConfig) -> None:
    """Reject settings that have no effect.

    Raises:
        UnreadKeysError: Naming all of them, what would read them, and their defaults.
    """
    found = {}
    own = config.method.unread.items()
    for rule in (*RULES, *(Rule([f"method.{k}"], lambda _: False, by) for k, by in own)):
        for path in rule.keys if not rule.read(config) else ():
            group, _, key = path.partition(".")
            settings, defaults = said(config, group)
            if key in defaults and (value := settings.get(key, defaults[key])) != defaults[key]:
                default = "null" if defaults[key] is None else defaults[key]
                found[path] = (
                    f"{path}={value} has no effect here: it is for {rule.reader}. Leave it at "
                    f"{default}."
                )
    if found:
        raise UnreadKeysError("\n  ".join(found.values()), found)


def refuse_misfits(config: RunConfig) -> None:
    """Reject values of one group that another group makes impossible.

    Raises:
        ConfigError: Naming the key, and what to set.
    """
    asked, clients = config.clients_per_round, config.clients
    if clients is not None and cohort_size(asked, clients) > clients:
        raise ConfigError(
            f"clients_per_round={asked}, but there are only {clients} clients; "
            "lower clients_per_round or raise clients"
        )
    if config.choices["local"] == "own" and config.local.train is None:
        raise ConfigError(
            "local=own, but local.train names no training function. Set local.train=module:name "
            "(in Python fedraclora.simulate(train=function))."
        )
    said, stop = config.data.get("metrics"), config.stop.metric
    names = map(named_loss, said if isinstance(said, list) else ())
    known = {*MEASURED, *(short_name(name) for name in names if is_own(name))}
    if not stop.startswith("clients.") and stop.removeprefix(PERSONAL) not in known:
        raise unknown("stop.metric", stop, MEASURED)
