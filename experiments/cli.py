"""``fedraclora``: one console script, one subcommand per job."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from fedraclora.errors import FedRacLoraError, unknown

CONF = Path(__file__).resolve().parents[1] / "conf"
COMMANDS = {
    "simulate": "run a federated experiment in this process; -m sweeps",
    "compare": "read run folders into one table and figures",
    "bench": "time whole rounds of the engines against the physical limit",
}


def groups() -> dict[str, dict[str, str]]:
    """List the config groups: group -> choice -> the first comment line of its file."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        first = next(text for text in lines if "@package" not in text)  # Hydra wants that on line 1
        found.setdefault(path.parent.name, {})[path.stem] = first.lstrip("# ").rstrip()
    return found


def usage() -> str:
    """Write the help text."""
    lines = ["usage: fedraclora COMMAND [OVERRIDE ...]", "", "commands:"]
    lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "overrides are Hydra's: group=choice, key=value, -m group=a,b key=1,2 for a sweep.",
        "keys typed most: method.rank method.alpha data.root local.lr local.epochs clients cohort",
        "  rounds seed device output.dir resume experiment; all of them: conf/config.yaml",
        "",
        "groups:",
    ]
    for group, choices in groups().items():
        lines.append(f"  {group}=")
        lines += [f"    {name:<22} {text}" for name, text in choices.items()]
    return "\n".join(lines)


def check_choices(words: Sequence[str]) -> None:
    """Refuse a choice of a group that does not exist, before Hydra composes.

    Raises:
        ConfigError: With the choices that exist and the nearest one.
    """
    table = groups()
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key not in table or not value or value == "null":
            continue
        for choice in value.split(","):
            if choice not in table[key]:
                raise unknown(key, choice, table[key])


def main(words: Sequence[str] | None = None) -> None:
    """Run a subcommand; every error raised on purpose ends in one line and status 1."""
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(usage())
        return
    command, rest = words[0], words[1:]
    try:
        if command not in COMMANDS:
            raise unknown("command", command, COMMANDS)
        if command == "simulate":
            if {"-h", "--help"} & set(rest):
                print(usage())
                return
            check_choices(rest)
        sys.argv = [f"fedraclora {command}", *rest]
        status = importlib.import_module(f"experiments.{command}").main()
    except FedRacLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
