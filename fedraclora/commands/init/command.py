"""``fedraclora init NAME``: write a small project that runs unchanged, as a start for your own.

The project has samples, a model, a preset, a script and a test; its README explains how to run
each. ``--example reviews`` writes the data of the tutorial *Five hospitals* instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from string import Template

import yaml

from fedraclora.commands.init.reviews import reviews
from fedraclora.compose.choices import groups
from fedraclora.errors import ConfigError
from fedraclora.run.folder import refuse_full

TEMPLATES = Path(__file__).parent / "project"  # the project's files; NAME is replaced in paths
EXAMPLES = Path(__file__).parent / "examples"
TABLES = {"reviews": reviews}  # example -> function of its tables, by the name of the CSV file


def write_project(name: str, where: Path, example: str | None = None) -> Path:
    """Write a project, or an example, to a new folder.

    Args:
        name: Name of the project, its folder and its preset.
        where: Parent of the new folder.
        example: A key of `TABLES`; None for a project.

    Returns:
        The new folder.

    Raises:
        ConfigError: If the name is not valid for a preset and a Python module, or the folder is not
            empty.
        DataError: If the package with the data of an example is missing.
    """
    # YAML reads `true` as a truth value; a built-in preset hides one of the same name.
    if not (name.isascii() and name.isidentifier() and yaml.safe_load(name) == name):
        raise ConfigError(
            f"{name!r} cannot name a project: use letters, digits and _, not a digit first"
        )
    if name in groups()["experiment"]:
        raise ConfigError(f"{name} is a preset of fedraclora: choose another name")
    folder = where / name
    refuse_full(folder)
    tables = TABLES[example]() if example else {}
    templates = EXAMPLES / example if example else TEMPLATES
    for template in templates.rglob("*.tmpl"):
        path = template.relative_to(templates).as_posix().removesuffix(".tmpl")
        file = folder / path.replace("NAME", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(template.read_text()).substitute(name=name))
    for table, frame in tables.items():
        frame.to_csv(folder / f"{table}.csv", index=False)
    return folder


def main(words: Sequence[str]) -> None:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="fedraclora init", description="Write a small project that runs as it is."
    )
    parser.add_argument("name", metavar="NAME", help="of the project and of its folder, made here")
    parser.add_argument(
        "--example", choices=sorted(TABLES), help="write the data of a tutorial instead"
    )
    arguments = parser.parse_args(words)
    write_project(arguments.name, Path(), arguments.example)
    if arguments.example:
        print(f"written: {arguments.name}. Its README.md says what each file is.")
        return
    print(f"written: {arguments.name}. To run it:")
    print(
        f"  cd {arguments.name} && "
        f"fedraclora simulate --config-dir conf experiment={arguments.name}"
    )
