"""What the pages under docs/ tell a reader to type, and where they lead, is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedraclora.binding import build
from fedraclora.commands import cli, deploy
from fedraclora.commands.compare import run
from fedraclora.commands.compare.command import compare_methods
from fedraclora.commands.study.file import Study
from fedraclora.commands.study.leaderboard import chosen, find
from fedraclora.commands.watch import watch_options
from fedraclora.compose.overrides import composed
from fedraclora.compose.words import check_word, key_values, part
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ConfigError
from fedraclora.experiments.bench.command import parse
from fedraclora.experiments.theory.command import TheoryConfig
from fedraclora.strategies.methods import METHODS
from fedraclora.tuning.space import Space, settings
from fedraclora.tuning.task import refuse_if_none_runs

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "docs" / "records").glob("[!R]*.md"))  # not its README.md
FRONT = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")),
    *(ROOT / "docs" / folder / "README.md" for folder in ("records", "adr")),
]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *TUTORIALS, *RECORDS]
LINES = [
    line.partition("#")[0].strip()
    for page in [ROOT / "README.md", *PAGES]
    # Of commands.md there are sweeps (test_readme.py), of own.md a module (test_own_page.py), of
    # tutorials presets (test_tutorial_hospitals.py).
    if page.name not in {"commands.md", "own.md"} and page not in TUTORIALS
    for block in re.findall(r"```bash[^\n]*\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
LINES = [line for line in LINES if not set(line) & set("<|&")]  # whole commands alone
SIMULATIONS = [
    line
    for line in LINES
    if line.startswith("fedraclora simulate") and not {"--help", "--cfg"} & {*line.split()}
]
DEPLOYMENTS = [  # that of data.md has a module (test_own_data.py)
    line for line in LINES if line.startswith("fedraclora deploy") and "mine:" not in line
]
THEORIES = [line for line in LINES if line.startswith("fedraclora theory")]
# A page may show what a command is refused with: the error is what it prints.
REFUSED = re.compile(r"```bash\n(fedraclora simulate [^\n]+)\n```\n+```text\nerror: ([^\n;:]+)")
COMPARED = "fedraclora compare study="
COMPARISONS = [line for line in LINES if line.startswith(COMPARED) and ".yaml" not in line]
OF_METHODS = [line for line in LINES if line.startswith("fedraclora compare method=")]
TUNINGS = [line for line in LINES if line.startswith("fedraclora tune")]
BENCHES = [line for line in LINES if line.startswith("fedraclora bench")]


@pytest.mark.parametrize("line", SIMULATIONS)
def test_each_simulation_composes(line: str) -> None:
    with watch_options(cli.spelled_out(shlex.split(line)[2:])) as words:
        plain = composed(words)
    if said := {k: v for page in PAGES for k, v in REFUSED.findall(page.read_text())}.get(line):
        with pytest.raises(ConfigError, match=re.escape(said)):
            from_plain(plain, METHODS)
    else:
        from_plain(plain, METHODS)


@pytest.mark.parametrize("line", DEPLOYMENTS)
def test_each_deployment_composes(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs" / "deploy")  # where the package `clinic` is
    own, words = part(check_word(shlex.split(line)[2:])[0], deploy.OWN_KEYS)
    deploy.prepare(words, deploy.own_settings(own)[1])


@pytest.mark.parametrize("line", COMPARISONS)
def test_each_comparison_finds_its_study_and_rows(line: str) -> None:
    said = key_values(shlex.split(line)[2:])
    assert chosen(find(str(said["study"])), said, []).rows


@pytest.mark.parametrize("line", OF_METHODS)
def test_each_comparison_of_methods_has_rows_that_compose(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = list[set[str]]()

    def begin(rows: Mapping[str, object], _out: Path, _seeds: int) -> None:
        begun.append({*rows})
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_all", begin)
    words = shlex.split(line)[2:]
    with pytest.raises(KeyboardInterrupt):
        compare_methods(words)
    (rows,) = begun
    (methods,) = (word.split("=")[1] for word in words if word.startswith("method="))
    assert {*methods.split(",")} <= rows


@pytest.mark.parametrize("line", TUNINGS)
def test_each_tuning_composes(line: str) -> None:
    words = shlex.split(line)[2:]
    own = [word for word in words if word.startswith("tune.")]
    asked, plain = settings(own, {}), composed([word for word in words if word not in own])
    keys = {word.removeprefix("tune.").partition("=")[0] for word in own}
    refuse_if_none_runs(plain, Space.of(plain, set(), asked, keys))


def test_the_study_of_ones_own_is_one() -> None:
    file = ROOT / "docs" / "examples" / "cheap.yaml"
    study = Study.parse(file.read_text(), file, {})
    assert study.reference in study.rows
    for row in study.rows:
        for phase in ("tune", "final"):
            from_plain(composed(study.jobs(phase, row, study.values(row))[0].overrides), METHODS)


@pytest.mark.parametrize("line", BENCHES)
def test_each_benchmark_is_understood(line: str) -> None:
    parse(shlex.split(line)[2:])


@pytest.mark.parametrize("line", THEORIES)
def test_each_run_of_theory_is_understood(line: str) -> None:
    build("theory", TheoryConfig, key_values(shlex.split(line)[2:]))


@pytest.mark.parametrize("page", [*PAGES, *FRONT], ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_and_test_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    # CONTRIBUTING.md names the test of a method that its reader is to write.
    for name in {*re.findall(r"\b(test_\w+\.py)\b", text)} - {"test_my_method.py"}:
        assert [*(ROOT / "tests").rglob(name)], name


def asked_of_a_registry(text: str) -> set[str]:
    """The packages that a text tells people to install by name, by each `pip install` in it."""
    found = set[str]()
    for said in re.findall(r"pip install ([^\n`#){]+)", text):
        words = said.replace("'", " ").replace('"', " ").split()
        for before, word in zip(["", *words], words, strict=False):
            takes_file = before in {"-r", "-c", "-e", "--requirement", "--editable"}
            if re.match(r"[A-Za-z]", word) and not takes_file:
                found.add(re.split(r"[^\w-]", word)[0].lower())
    return found


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("`pip install 'fedraclora[tune]'`", {"fedraclora"}),
        ("pip install -e '.[tune]'", set()),
        ("pip install --no-deps -r requirements-text.txt gguf>=1  # more", {"gguf"}),
    ],
)
def test_packages_that_a_line_installs_by_name(said: str, names: set[str]) -> None:
    assert asked_of_a_registry(said) == names


def test_pages_and_messages_install_from_a_registry_only_what_is_pinned_or_depended_on() -> None:
    """Until it is published, the name of this project there is anybody's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted += [path.read_text().splitlines() for path in ROOT.glob("requirements-*.txt")]
    known = {re.split(r"[^\w-]", line)[0].lower() for lines in wanted for line in lines}
    known -= {"", project["name"]}
    kinds = {".md", ".ipynb", ".py", ".tmpl", ".j2", ".txt", ".sh", ".yaml", ".toml"}
    rooms = ("docs", "fedraclora", "strategies", "clients", "conf", "experiments")
    paths = [*FRONT, ROOT / "Makefile", ROOT / "SECURITY.md", ROOT / "docs/deploy/Dockerfile"]
    paths += [p for room in rooms for p in (ROOT / room).rglob("*") if p.suffix in kinds]
    named = {
        path.relative_to(ROOT).as_posix(): foreign
        for path in paths
        if (foreign := asked_of_a_registry(path.read_text(encoding="utf-8")) - known)
    }
    assert not named
