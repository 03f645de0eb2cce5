"""The site of the documentation is built strictly, and fetches nothing from elsewhere."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedraclora
import fedraclora.client
import fedraclora.errors
import fedraclora.flower
from fedraclora.errors import FedRacLoraError
from fedraclora.strategies.methods import METHODS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p.stem for p in DOCS.glob("*.md") if p.name != "README.md")
PAGES += sorted(f"records/{p.stem}" for p in (DOCS / "records").glob("[!R]*.md"))
PAGES += sorted(f"tutorials/{p.stem}" for p in (DOCS / "tutorials").glob("*.md"))
FETCHED = r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\s>]+"
IMPORT = re.compile(r"^from (fedraclora\.\S+) import (.+)$", re.MULTILINE)
BUILD = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*BUILD, str(folder)], cwd=ROOT, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_in_the_groups_of_the_table_of_contents(site: Path) -> None:
    index = (site / "index.html").read_text()
    assert [page for page in PAGES if f'href="{page}.html"' not in index] == []
    assert [
        p.stem
        for p in (ROOT / "docs" / "adr").glob("[!R]*.md")
        if not (site / "adr" / f"{p.stem}.html").is_file()
    ] == []
    tabs = re.findall(r'class="?md-tabs__link"?[^>]*>\s*([^<]+?)\s*<', index)
    contents = (DOCS / "README.md").read_text()
    groups = [group for group in re.findall(r"^## (.+)$", contents, re.MULTILINE) if group in tabs]
    assert tabs == groups
    assert {"Start", "Guides", "Reference", "Records", "Maintainers"} <= {*tabs}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    found = [
        link
        for page in site.rglob("*.html")
        for link in re.findall(FETCHED, page.read_text())
        if 'rel="canonical"' not in link
    ]
    assert found == []


def test_the_reference_has_the_public_names_and_no_others(site: Path) -> None:
    """What packages export, and what the pages tell people to import."""
    shown = set()
    for page in (site / "reference").glob("*.html"):
        if page.stem != "methods":
            shown |= {*re.findall(r'<h2 id="?(fedraclora\.[\w.]+)"?', page.read_text())}
    public = {
        f"{module.__name__}.{name}"
        for module in (fedraclora, fedraclora.client, fedraclora.flower)
        for name in module.__all__
    }
    kinds = [kind for kind in vars(fedraclora.errors).values() if isinstance(kind, type)]
    public |= {f"{k.__module__}.{k.__name__}" for k in kinds if issubclass(k, FedRacLoraError)}
    told = imported(*DOCS.glob("*.md"), DOCS / "examples" / "mine.py")
    assert public | told <= shown
    assert shown - public == told | (imported(ROOT / "CONTRIBUTING.md") & shown)


def imported(*files: Path) -> set[str]:
    """The names that pages and programs import from inside the package, methods left out."""
    found = set()
    for file in files:
        text = file.read_text()
        blocks = re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)
        for code in blocks if file.suffix == ".md" else [text]:
            for module, names in IMPORT.findall(code):
                if module != "fedraclora.client" and ".methods." not in module:
                    found |= {f"{module}.{name.strip()}" for name in names.split(",")}
    return found


def test_the_reference_says_what_docstrings_say(site: Path) -> None:
    python = (site / "reference" / "python.html").read_text()
    for name in ("RunResult.history", "RunResult.model", "RunResult.evaluate"):
        assert f'id="fedraclora.{name}"' in python
    methods = (site / "reference" / "methods.html").read_text()
    page = (site / "methods.html").read_text()
    for method in METHODS.values():
        assert f'id="{method.__module__}.{method.__name__}"' in methods
        assert f'href="reference/methods.html#{method.__module__}"' in page
    assert "&gt;&gt;&gt;" in python  # a doctest, as code


def test_fences_are_code(site: Path) -> None:
    for page in (*PAGES, "index", "files/CONTRIBUTING"):
        assert "```" not in re.sub(r"<[^>]+>", "", (site / f"{page}.html").read_text()), page


def test_what_the_hooks_say_of_themselves() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    outcome = doctest.testmod(hooks, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted > 2
    assert outcome.failed == 0


@pytest.mark.long
def test_on_a_phone_no_code_of_the_first_page_scrolls_and_figures_can_be_read(site: Path) -> None:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 390, "height": 900})
        page.goto((site / "index.html").as_uri())
        assert page.locator("pre > code").count() > 3
        wide = "e => [...document.querySelectorAll(e)].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"({wide})('.language-bash code, .language-python code').length") == 0
        page.goto((site / "records" / "study.html").as_uri())
        figure = page.locator("p > img[src$='.png']").first
        assert figure.evaluate("e => e.getBoundingClientRect().width") >= 500
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        opened.close()
