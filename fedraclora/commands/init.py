"""``fedraclora init NAME``: write a small project that runs unchanged, as a start for your own.

It has samples, a model, a preset, a script and a test; its README says how to run each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from string import Template

import yaml

from fedraclora.compose.choices import groups
from fedraclora.errors import ConfigError
from fedraclora.run.folder import refuse_full

TEMPLATES = Path(__file__).parent / "project"  # as the project will be, NAME for its name


def write_project(name: str, where: Path) -> Path:
    """Write the project.

    Args:
        name: Of the project, its folder and its preset.
        where: The folder in which its own is made.

    Returns:
        Its folder.

    Raises:
        ConfigError: If the name cannot be that of a preset and a Python module, or something lies
            in the folder already.
    """
    # `true` would be read as no name; a preset of ours would hide one of the same name.
    if not (name.isascii() and name.isidentifier() and yaml.safe_load(name) == name):
        raise ConfigError(
            f"{name!r} cannot name a project: use letters, digits and _, not a digit first"
        )
    if name in groups()["experiment"]:
        raise ConfigError(f"{name} is a preset of fedraclora: choose another name")
    folder = where / name
    refuse_full(folder)
    for template in TEMPLATES.rglob("*.tmpl"):
        path = template.relative_to(TEMPLATES).as_posix().removesuffix(".tmpl")
        file = folder / path.replace("NAME", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(template.read_text()).substitute(name=name))
    return folder


def main(words: Sequence[str]) -> None:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="fedraclora init", description="Write a small project that runs as it is."
    )
    parser.add_argument("name", metavar="NAME", help="of the project and of its folder, made here")
    name = parser.parse_args(words).name
    write_project(name, Path())
    print(f"written: {name}. To run it:")
    print(f"  cd {name} && fedraclora simulate --config-dir conf experiment={name}")
