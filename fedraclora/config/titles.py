"""Name a run by its config, for a line of a terminal or the title of a picture."""

from __future__ import annotations

from fedraclora.binding import Plain, section
from fedraclora.errors import ConfigError
from fedraclora.object_registry import NAME, registered_object


def method_label(plain: Plain) -> str:
    """Name a run in one or two words; a method of the program's by its class."""
    method = section(plain, "method")
    if method["name"] == NAME:
        try:
            return type(registered_object("method", method.get("digest"))).__name__
        except ConfigError:  # the run is one of another process
            return "your method"
    rank = f" r={method['rank']}" if "rank" in method else ""
    return f"{method['name']}{rank}"


def run_title(plain: Plain) -> str:
    """Name a run as the title of a picture does: method, data and division, step size, seed."""
    data, partition, local = (section(plain, key) for key in ("data", "partition", "local"))
    division = "" if partition.get("name") == "given" else f" ({partition.get('name')})"
    named = f"{method_label(plain)} on {data['name']}{division}"
    train = local.get("train")  # of the user's: no step size of ours is read
    steps = f"lr={local.get('lr')}" if train is None else str(train).partition("@")[0]
    return f"{named}, {local.get('name', 'lr')} {steps}, seed {plain.get('seed')}"
