"""Keys that are set and that nothing reads, since another key of the config decides so.

A key at its default may stand anywhere: the files of `conf` list the keys of their group. A key
with another value was set by somebody who expects something of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

from fedraclora.allocation.rules import Uniform
from fedraclora.attacks.attack import Attack
from fedraclora.config.settings import EvaluateConfig, PretrainConfig, StopConfig
from fedraclora.errors import UnreadKeysError
from fedraclora.protocol.method import Method
from fedraclora.training.localconfig import LocalConfig


@dataclass(frozen=True)
class Groups:
    """The groups of a config that say which keys of others are read.

    Attributes:
        method, allocation, local, pretrain, attack, evaluate, stop: The groups.
        trained_in_full: Whether ``head``, ``bias`` or ``dense`` have layers trained in full.
        local_head: Whether ``head`` is ``local``.
    """

    method: Method
    allocation: Uniform
    local: LocalConfig
    pretrain: PretrainConfig
    attack: Attack
    evaluate: EvaluateConfig
    stop: StopConfig
    trained_in_full: bool
    local_head: bool


@dataclass(frozen=True)
class Rule:
    """Some keys of a group, and what reads them.

    Attributes:
        group: Its name.
        keys: Of the group.
        read: Whether something reads them.
        reader: What does, for messages.
    """

    group: str
    keys: Collection[str]
    read: Callable[[Groups], bool]
    reader: str


RULES = (
    Rule("local", ["epochs"], lambda g: g.local.steps is None, "local.steps=null"),
    Rule("local", ["damping"], lambda g: g.local.adjust != "none", "local.adjust"),
    Rule(
        "local",
        ["final"],
        lambda g: g.local.schedule in {"cosine", "linear"},
        "local.schedule=cosine and linear",
    ),
    Rule(
        "local",
        ["step_every", "step_factor"],
        lambda g: g.local.schedule == "step",
        "local.schedule=step",
    ),
    Rule(
        "local",
        ["moments_kept"],
        lambda g: links_end(g.method, g.allocation),
        "methods whose links end (with method.resample_every), and no link of this one ever does",
    ),
    Rule(
        "local",
        ["dense_lr"],
        lambda g: g.trained_in_full,
        "layers trained in full (head=average, head=local, bias=average, dense)",
    ),
    Rule(
        "method",
        ["density"],
        lambda g: getattr(g.method, "sketch", "sparse_sign") == "sparse_sign",
        "method.sketch=sparse_sign",
    ),
    Rule(
        "pretrain",
        ["labels", "lr", "batch_size"],
        lambda g: g.pretrain.epochs > 0,
        "pretrain.epochs above 0 (pretrain=none leaves all of it out)",
    ),
    Rule(
        "attack",
        ["share"],
        lambda g: type(g.attack) is not Attack,
        "attacks, and attack=none has none",
    ),
    Rule(
        "evaluate",
        ["clients"],
        lambda g: g.local_head or g.method.traits.client_state,
        "head=local and methods that leave a part at each client",
    ),
    Rule(
        "evaluate",
        ["answers", "new_tokens", "shown"],
        lambda g: g.evaluate.generate is not None,
        "evaluate.generate",
    ),
    Rule("stop", ["metric"], lambda g: g.stop.patience is not None, "stop.patience"),
)


def links_end(method: Method, allocation: Uniform) -> bool:
    """Tell whether what a method trains is ever begun anew, as far as its settings say."""
    if type(allocation) is not Uniform:  # components are cut, and those that stay are other ones
        return True
    return getattr(method, "link_rounds", None) is not None


def refuse_unread(groups: Groups) -> None:
    """Refuse settings that nothing reads.

    Raises:
        UnreadKeysError: Naming all of them, what would read them, and their defaults.
    """
    found = {}
    for rule in RULES:
        settings = getattr(groups, rule.group)
        defaults = {field.name: field.default for field in fields(settings)}
        for key in rule.keys if not rule.read(groups) else ():
            if key in defaults and (value := getattr(settings, key)) != defaults[key]:
                default = "null" if defaults[key] is None else defaults[key]
                found[f"{rule.group}.{key}"] = (
                    f"{rule.group}.{key} is {value}, which nothing reads here: it is for "
                    f"{rule.reader}; leave it at {default}"
                )
    if found:
        raise UnreadKeysError("\n  ".join(found.values()), found)
