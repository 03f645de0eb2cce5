"""Decide what may train on a node's data: runs that its owner approved, within limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from fedraclora.errors import ConfigError
from fedraclora.limits import Count, Positive
from fedraclora.schema import bound

FORM = "FILE.yaml with `approved:`, a list of digests, and perhaps `run:` and `day:` with limits"


@dataclass(frozen=True)
class Limits:
    """Limit what this node does for one run, or in one day (UTC); None: no limit.

    Attributes:
        rounds: Rounds in which it trains.
        megabytes: Megabytes (10^6 bytes) that it sends.
        hours: Hours from messages to their replies.
    """

    rounds: Count | None = None
    megabytes: Positive | None = None
    hours: Positive | None = None

    def reached(self, used: Limits) -> str | None:
        """Return the limit that is reached, as ``hours=2``; None if there is room."""
        for field in fields(self):
            most, now = getattr(self, field.name), getattr(used, field.name)
            if most is not None and now >= most:
                return f"{field.name}={most:g}"
        return None


@dataclass(frozen=True)
class Policy:
    """What an owner allows.

    Attributes:
        approved: Digests of runs (`fedraclora.engines.owner.request`).
        run: Limits of each run.
        day: Limits of a day, all runs together.
    """

    approved: frozenset[str]
    run: Limits = Limits()
    day: Limits = Limits()

    @classmethod
    def read(cls, file: Path) -> Policy:
        """Read the owner's file.

        Raises:
            ConfigError: If it cannot be read, or has another form.
        """
        wanted = f"--approve={file} must be a {FORM}"
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{wanted}: {error}") from error
        if not isinstance(found, Mapping):
            raise ConfigError(f"{wanted}, and is a {type(found).__name__}")
        if more := sorted(map(str, found.keys() - {"approved", "run", "day"})):
            raise ConfigError(f"{wanted}, and has the keys {', '.join(more)}")
        digests = found.get("approved") or []
        if not isinstance(digests, list) or not all(map(is_digest, digests)):
            raise ConfigError(
                f"--approve={file}: approved is {digests!r:.80}, expected a list of digests of 64 "
                "hexadecimal digits"
            )
        limits = {}
        for key in ("run", "day"):
            group = found.get(key) or {}
            if not isinstance(group, Mapping):
                raise ConfigError(
                    f"--approve={file}: {key} is {group!r:.80}, expected limits, as in "
                    f"{key}: {{rounds: 100, megabytes: 500, hours: 8}}"
                )
            limits[key] = bound(key, Limits, group)()
        return cls(frozenset(digests), **limits)

    def with_approved(self, digest: str) -> Policy:
        """Return the policy with one more approved run."""
        return replace(self, approved=self.approved | {digest})

    def write(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        limits = {"run": asdict(self.run), "day": asdict(self.day)}
        new = file.with_suffix(".new")
        new.write_text(yaml.safe_dump({"approved": sorted(self.approved), **limits}))
        new.replace(file)


def is_digest(found: object) -> bool:
    """Check whether a value has the form of a digest."""
    return isinstance(found, str) and len(found) == 64 and not {*found} - {*"0123456789abcdef"}
