"""List old names of keys and values; the error for an old name gives the new one.

A key is renamed where it is defined, in `conf` and in stored runs, and its old name becomes a row
here.
"""

from __future__ import annotations

TEST_KEYS = (
    "data.test_fraction (the share of the samples that is held out), data.test_file (a file) or "
    "data.test_function (package.module:function)"
)
# The old key, or group -> the new one, or several by meaning.
KEYS = {
    "cohort": "clients_per_round",
    "server_optimiser": "server_optimizer",
    "dense": "modules_to_save",
    "start": "init_from",
    "targets": "target_modules",
    "weights": "aggregation_weights",
    "wire": "compression",
    "data.arguments": "data.parameters",
    "data.standardise": "data.standardize",
    "data.test": TEST_KEYS,
    "data.test_share": "data.test_fraction",
    "local.dense_lr": "local.full_lr",
    "local.final": "local.min_lr_ratio",
    "local.optimiser": "local.optimizer",
    "local.moments": "local.optimizer_state",
    "local.moments_kept": "local.optimizer_state_kept",
    "method.first": "method.init",
    "method.initial": "method.init",
    "method.normalise": "method.normalize",
    "method.resample_every": "method.merge_every",
    "method.side": "method.train (of methods that train both factors: method.zero_init)",
    "model.arguments": "model.parameters",
    "model.targets": "model.target_modules",
}
# The kind of a value, and the old value -> its replacement.
VALUES = {
    ("aggregation_weights", "examples"): "write aggregation_weights=samples",
    ("bias", "average"): "write bias=full",
    ("command", "flower"): "use `fedraclora simulate engine=ray` with the same arguments, "
    "`fedraclora deploy nodes=3`, or in a Flower app of your own fedraclora.flower.LowRank "
    "(docs/flower.md)",
    ("engine", "flower"): "use engine=ray (processes of this machine or a cluster; same weights as "
    "engine=vectorized), `fedraclora deploy nodes=3` (Flower's SuperNodes), or in a Flower app of "
    "your own fedraclora.flower.LowRank (docs/flower.md)",
    ("engine", "vectorised"): "write engine=vectorized",
    ("evaluate.clients", "cohort"): "write evaluate.clients=round",
    ("head", "adapt"): "write head=lora",
    ("head", "average"): "write head=full",
    ("head", "local"): "write head=personal",
    ("local.optimizer_state", "link"): "write local.optimizer_state=merge",
    ("method.init", "drawn"): "write method.init=random",
    ("method.train", "left"): "write method.train=A",
    ("method.train", "right"): "write method.train=B",
    ("method.zero_init", "left"): "write method.zero_init=A",
    ("method.zero_init", "right"): "write method.zero_init=B",
}


def renamed(key: str) -> str:
    """Return a sentence with the new name of an old key; empty for any other key.

    Example:
        >>> renamed("data.test_share"), renamed("seed")
        ('data.test_share is called data.test_fraction now', '')
        >>> renamed("wire.uplink")
        'wire.uplink is called compression.uplink now'
    """
    group, _, inner = key.partition(".")
    new = KEYS.get(key) or (f"{KEYS[group]}.{inner}" if group in KEYS else "")
    return new and f"{key} is called {new} now"


def instead_of(kind: str, value: object) -> str:
    """Return a sentence with the replacement of an old value; empty for any other value.

    Example:
        >>> instead_of("head", "adapt")
        'write head=lora'
    """
    return VALUES.get((kind, str(value)), "")
