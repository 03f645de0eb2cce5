"""Describe a run to the owner of the data, before it trains: its code, settings and what it sends.

The digest is that of the code and of all settings, except whether the run is resumed, and the
server's folder. With the same digest a run has the same code, method, data settings, rounds,
privacy and compression.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedraclora.wire.fields import printable

SETTINGS, SENDS = "cfg-json", "sends"  # keys of a run's config
# Whether it is resumed, and after which round the operator's ledger ends.
RESUME, FOLLOWED = "resume", "followed"
SECTIONS = ("method", "model", "data", "local", "compression", "privacy", "secure", "evaluate")
FOLDERS = (("output", "dir"), ("engine", "folder"))  # of the server
WIDTH, LONGEST = 100, 4000  # characters of a line, and of the settings of a section


def digest_of(app: bytes, config: Mapping[str, object]) -> str:
    """Return the digest of a run.

    Args:
        app: The bytes of its app bundle.
        config: Its run config.
    """
    code = hashlib.sha256(app).hexdigest()
    settings = {key: value for key, value in config.items() if key not in (RESUME, FOLLOWED)}
    with suppress(LookupError, TypeError, ValueError):  # another app has other settings
        plain = json.loads(str(settings[SETTINGS]))
        for group, key in FOLDERS:
            plain[group] = {k: v for k, v in plain[group].items() if k != key}
        settings[SETTINGS] = plain
    text = json.dumps([code, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RunRequest:
    """A run as its owner's node meets it.

    Attributes:
        run: Flower's number of the run: another one when it is resumed.
        digest: Its digest.
        text: Its description, in lines for a terminal.
        code: The SHA-256 of its app bundle.
    """

    run: int
    digest: str
    text: str
    code: str

    @classmethod
    def of(cls, run: int, app: bytes, config: Mapping[str, object]) -> RunRequest:
        """Describe a run.

        Args:
            run: Flower's number of the run.
            app: The bytes of its app bundle.
            config: Its run config.
        """
        digest, code = digest_of(app, config), hashlib.sha256(app).hexdigest()
        rows = {"run": str(run), "digest": digest}
        rows["code"] = f"{len(app) / 1e6:.2f} MB, SHA-256 {code}"
        return cls(run, digest, in_lines(rows | _settings(config)), code)


def in_lines(rows: Mapping[str, str]) -> str:
    """Write names and texts side by side, without control characters."""
    left = max(map(len, rows)) + 4
    text = ""
    for name, value in rows.items():
        plain = printable(value, LONGEST)  # another machine's text
        first = f"  {name:<{left - 2}}"
        lines = textwrap.wrap(plain, WIDTH, initial_indent=first, subsequent_indent=" " * left)
        text += "".join(f"{line}\n" for line in lines)
    return text


def _settings(config: Mapping[str, object]) -> dict[str, str]:
    """Describe the settings of a run, and what it sends."""
    try:
        plain = json.loads(str(config[SETTINGS]))
        clients = f"{plain['clients_per_round']} of {plain['clients']} clients"
        rows = {"rounds": f"{plain['rounds']}, each with {clients}"}
        rows |= {name: _section(plain[name]) for name in SECTIONS}
        return {**rows, "leaves": _leaving(plain, config.get(SENDS))}
    except (KeyError, TypeError, ValueError):
        told = json.dumps(dict(config), default=str)
        return {"settings": f"they are not those of fedraclora: {told:.300}"}


def _section(group: Mapping[str, Any]) -> str:
    """Name the choice of a section, and the keys that are set."""
    words = [str(group["name"])] if "name" in group else []
    unset: tuple[object, ...] = (None, False, [], {})
    words += [f"{k}={v}" for k, v in group.items() if k != "name" and v not in unset]
    return ", ".join(words)


def _leaving(plain: Mapping[str, Any], sends: object) -> str:
    """Describe what a client sends in a round."""
    private, secure = plain["privacy"]["name"], plain["secure"]["name"]
    count = f"{sends:,} numbers" if isinstance(sends, int) and sends else "an update"
    words = [f"{count} in {plain['compression']['uplink']} for each client and round"]
    if secure == "none":
        words += ["readable by the server", "number of samples", "training loss"]
    else:
        words.append("masked, so that the server learns sums over clients")
    words.append("without noise" if private == "none" else f"with {private} privacy")
    if plain["evaluate"]["clients"] != "none":
        words.append("metrics on the node's own samples")
    return ", ".join(words)
