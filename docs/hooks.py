"""Hooks of MkDocs: the pages of this repository, as they are, with what its docstrings say.

The pages lie where a reader of the repository looks for them, and link to each other, to results
and to code as files do. Here each gets its place on the site, and each link the place of its file.
The table of contents is that of `docs/README.md`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "docs/README.md": "contents.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)(?=[)#])")
METHOD = re.compile(r"strategies/methods/(\w+)\.py")
# A page of the reference -> the modules and names whose docstrings it shows.
REFERENCE = {
    "python": ("From Python", ["fedraclora.simulate", "fedraclora.RunResult"]),
    "methods": ("Methods", []),  # those that docs/methods.md links to
    "lowrank": ("Low-rank algebra", ["fedraclora.lowrank"]),
    "sketch": ("Sketches", ["fedraclora.sketch"]),
    "bounds": ("Bounds of the theory", ["fedraclora.experiments.theory.bounds"]),
}


class Examples(griffe.Extension):
    """What griffe calls the sections of docstrings that this project calls ``Example``."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Name the section as griffe does, so that its doctests are shown as code."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )


# The place of a page on the site -> the file of the repository that it shows.
shown: dict[str, str] = {}


def place_of(path: str) -> str:
    """Give the place on the site of a file or folder of the repository.

    Example:
        >>> place_of("docs/adr/0001.md"), place_of("CONTRIBUTING.md")
        ('adr/0001.md', 'files/CONTRIBUTING.md')
        >>> place_of("strategies/methods/fedavg.py")
        'reference/methods.md#fedraclora.strategies.methods.fedavg'
    """
    if path in MOVED:
        return MOVED[path]
    if method := METHOD.fullmatch(path):
        return f"reference/methods.md#fedraclora.strategies.methods.{method[1]}"
    if (ROOT / path).is_dir():
        return f"files/{path}/index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def links_of(path: str, text: str) -> list[str]:
    """List the files of the repository that a page of it links to."""
    folder = posixpath.dirname(path)
    return [posixpath.normpath(posixpath.join(folder, to[1])) for to in LINK.finditer(text)]


def text_of(path: str) -> str:
    """Give the Markdown of a page, or a list of the files of a folder; nothing for other files."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(f.name for f in file.iterdir() if f.is_file())
        folder = posixpath.basename(path)
        return f"# `{path}`\n\n" + "".join(f"- [{name}]({folder}/{name})\n" for name in names)
    return file.read_text() if path.endswith(".md") else ""


def listed(folder: str) -> list[str]:
    """List the pages of a folder in the order of its README.md, which has a row for each."""
    index = (ROOT / "docs" / folder / "README.md").read_text()
    return [folder + page for page in re.findall(r"^\| \[.*?\]\((.*?)\)", index, re.MULTILINE)]


def on_config(config: MkDocsConfig) -> None:
    """List all pages in the order of the three indices."""
    pages, records, decisions = map(listed, ("", "records/", "adr/"))
    reference = [{title: f"reference/{name}.md"} for name, (title, _) in REFERENCE.items()]
    config.nav = [
        {"Fed-RAC-LoRA": [{"What it is": "index.md"}, *pages, {"All pages": "contents.md"}]},
        {"Reference": reference},
        {"Records": ["records/README.md", *records]},
        {"Decisions": ["adr/README.md", *decisions]},
        {"Changing it": [place_of("CONTRIBUTING.md"), place_of("CHANGELOG.md")]},
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages outside `docs/`, whatever pages link to, and the reference."""
    files.remove(files.src_uris["README.md"])
    left = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    left += ["README.md", "docs/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    shown.clear()
    while left:
        path = left.pop()
        place = place_of(path)
        if "#" in place or place in shown or not (ROOT / path).exists():
            continue
        shown[place] = path
        text = text_of(path)
        left += links_of(path, text)
        if place in files.src_uris:
            continue
        listed = path in MOVED or "/" not in path
        level = InclusionLevel.INCLUDED if listed else InclusionLevel.NOT_IN_NAV
        what = {"content": text} if place.endswith(".md") else {"abs_src_path": str(ROOT / path)}
        files.append(File.generated(config, place, inclusion=level, **what))
    methods = METHOD.findall((ROOT / "docs" / "methods.md").read_text())
    for name, (title, names) in REFERENCE.items():
        of = names or [
            f"fedraclora.strategies.methods.{method}" for method in dict.fromkeys(methods)
        ]
        text = f"# {title}\n\n" + "".join(f"::: {each}\n\n" for each in of)
        files.append(File.generated(config, f"reference/{name}.md", content=text))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead the links of a page to places on the site, and write it as Python-Markdown reads it."""
    path = shown.get(page.file.src_uri)
    if path is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(place_of(*links_of(path, f"]({link[0]})")), here or ".")

    return indented(LINK.sub(moved, markdown))


def indented(markdown: str) -> str:
    r"""Indent what belongs to an item of a list by four, and leave one word behind a fence.

    Example:
        >>> indented("- a\n\n  ```bash no-test\n  b\n  ```")
        '- a\n\n    ```bash\n    b\n    ```'
    """
    lines: list[str] = []
    fence: int | None = None  # how far the open one is indented
    for line in markdown.split("\n"):
        own = len(line) - len(line.lstrip())
        depth = own if fence is None else fence
        mark = re.match(r"\s*```\w*", line)
        if mark:
            fence = own if fence is None else None
        shift = 4 - depth if depth in {2, 3} and line.strip() else 0
        lines.append(" " * shift + (mark[0] if mark else line))
    return "\n".join(lines)
