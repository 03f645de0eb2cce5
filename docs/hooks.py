"""Hooks of MkDocs: the pages of this repository, as they are, with what its docstrings say.

The pages lie where a reader of the repository looks for them, and link to each other, to results
and to code as files do. Here each gets its place on the site, and each link the place of its file.
The groups of the site are the headings of `docs/README.md`.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "docs/README.md": "contents.md"}
OUTSIDE = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")  # pages beside docs/
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)(?=[)#])")
ROW = re.compile(r"^\| \[.*?\]\((.*?)\) \|", re.MULTILINE)  # of a table of contents: a page
HEADED = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SUBHEADED = re.compile(r"^### ([^\n]+)\n(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
METHOD = re.compile(r"strategies/methods/(\w+)\.py")
# A page of the reference -> its title, what it is for, and the modules whose public names it shows
# (`__all__`), or single names.
REFERENCE = {
    "python": (
        "fedraclora",
        "What `import fedraclora` gives. [From Python](../python.md) teaches it.",
        ["fedraclora"],
    ),
    "client": (
        "fedraclora.client",
        "For a training function of your own. [Custom client code](../training.md) teaches it.",
        ["fedraclora.client"],
    ),
    "flower": (
        "fedraclora.flower",
        "For a Flower app of your own. [Flower: your own app](../flower.md) teaches it.",
        ["fedraclora.flower"],
    ),
    "parts": (
        "Base classes",
        "To derive your own parts from. [Your own parts](../own.md) teaches them.",
        [
            "fedraclora.attacks.Attack",
            "fedraclora.protocol.method.Traits",
            "fedraclora.protocol.program.ClientChunk",
            "fedraclora.protocol.program.GradientStage",
            "fedraclora.strategies.shared.layerwise.LayerMethod",
            "fedraclora.strategies.shared.layerwise.LayerUpdate",
            "fedraclora.strategies.weights.load_weights",
        ],
    ),
    "methods": (
        "Methods",
        "The classes behind `method=`. [Methods](../methods.md) has their formulas side by side.",
        [],  # those that docs/methods.md links to
    ),
    "errors": (
        "fedraclora.errors",
        "What fedraclora raises. Every error derives from `FedRacLoraError`.",
        ["fedraclora.errors"],
    ),
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


Nav = list[dict[str, Any]]


def listed(folder: str) -> list[str]:
    """List the pages of a folder in the order of its README.md, which has a row for each."""
    index = (ROOT / "docs" / folder / "README.md").read_text()
    return [folder + page for page in ROW.findall(index)]


def grouped(index: str) -> Nav:
    r"""Read the groups of a table of contents: a heading, and a row for each page below it.

    A heading without pages is no group; one of the next level is a group inside.

    Example:
        >>> grouped("## Guides\n### Data\n| [A](a.md) | x |\n## Start\n| [B](b.md) | y |")
        [{'Guides': [{'Data': ['a.md']}]}, {'Start': ['b.md']}]
    """
    found: Nav = []
    for title, text in HEADED.findall(index):
        pages: list[Any] = ROW.findall(f"\n{text}".partition("\n### ")[0])
        pages += [
            {name: rows} for name, part in SUBHEADED.findall(text) if (rows := ROW.findall(part))
        ]
        if pages:
            found.append({title: pages})
    return found


def on_config(config: MkDocsConfig) -> None:
    """List all pages by the groups of docs/README.md, the records and decisions by their own."""
    reference = [{title: f"reference/{name}.md"} for name, (title, *_) in REFERENCE.items()]
    nav = grouped((ROOT / "docs" / "README.md").read_text())
    groups = {title: pages for group in nav for title, pages in group.items()}
    groups["Start"] = [{"What it is": "index.md"}, *groups["Start"], {"All pages": "contents.md"}]
    groups["Reference"] = [*groups["Reference"], {"Python API": reference}]
    groups["Records"] = ["records/README.md", *listed("records/")]
    groups["Maintainers"] = [
        *map(place_of, OUTSIDE),
        *groups.pop("Maintainers"),  # its place is after the records
        {"Decisions": ["adr/README.md", *listed("adr/")]},
    ]
    config.nav = [{title: pages} for title, pages in groups.items()]


def names_of(places: list[str]) -> list[str]:
    """List the public names of modules, functions first, and the names that are none."""
    found = []
    for place in places:
        file = ROOT.joinpath(*place.split("."))
        path = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
        public = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        defined = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
        names = sorted(public[0] if public else defined, key=lambda name: name[0].isupper())
        found += [f"{place}.{name}" for name in names] if path.is_file() else [place]
    return found


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages outside `docs/`, whatever pages link to, and the reference."""
    files.remove(files.src_uris["README.md"])
    left = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    left += [*MOVED, *OUTSIDE]
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
        listed = path in {*MOVED, *OUTSIDE}
        level = InclusionLevel.INCLUDED if listed else InclusionLevel.NOT_IN_NAV
        what = {"content": text} if place.endswith(".md") else {"abs_src_path": str(ROOT / path)}
        files.append(File.generated(config, place, inclusion=level, **what))
    methods = METHOD.findall((ROOT / "docs" / "methods.md").read_text())
    for name, (title, about, names) in REFERENCE.items():
        of = names_of(names) or [
            f"fedraclora.strategies.methods.{method}" for method in dict.fromkeys(methods)
        ]
        text = f"# {title}\n\n{about}\n\n" + "".join(f"::: {each}\n\n" for each in of)
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
