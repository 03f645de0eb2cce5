"""A run that is killed, at any moment, goes on to the digests of the run that never was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from fedraclora.commands.simulate import run_one
from fedraclora.rng import generator
from fedraclora.run.ledger import digest_rows, read_ledger
from fedraclora.weights.links import read_links
from tests.campaigns import kill_resume
from tests.common import summary_of

CONF = Path(__file__).resolve().parents[2] / "conf"
JOB = [
    "data=least_squares",
    "data.clients=6",
    "data.features=7",
    "data.outputs=5",
    "data.labels=null",
    "clients=null",
    "clients_per_round=3",
    "rounds=3",
    "partition=given",
    "model=linear",
    "pretrain=none",
    "method.rank=2",
    "local.lr=0.05",
    "output.plots=false",
    "output.progress=false",
    "output.checkpoint_every=2",
]
BITS = ["compression.uplink=int4", "compression.downlink=int8", "compression.feedback=true"]
METHODS = {
    "fed_rac_lora": ["method=fed_rac_lora", "method.merge_every=3"],
    "pool_rac_lora": ["method=pool_rac_lora", "method.pool=2", "method.refresh=3"],
    "fedavg_lora": ["method=fedavg_lora"],
    "moments": ["method=cola", "local=adamw", "local.optimizer_state=run"],
    "basis of the last link": ["method=subspace_rac_lora", "method.merge_every=1"],
    "fewer bits": ["method=ffa_lora", *BITS],
    "pool in fewer bits": ["method=pool_rac_lora", "method.pool=2", "method.refresh=2", *BITS],
}

Plain = dict[str, object]


class Killed(BaseException):
    """Ends a run as SIGKILL would: no handler of errors sees it."""


@dataclass
class Reaper:
    """Ends a run at the n-th call that changes the disk.

    Attributes:
        at: Number of the call, from 1; 0 never kills.
        torn: End it in the middle of the call, half of the bytes written; else before it.
        calls: What has been called.
    """

    at: int = 0
    torn: bool = False
    calls: list[str] = field(default_factory=list)
    dead: bool = False

    def watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(first: Any, *rest: Any, **named: Any) -> Any:
            if self.dead and name == "open":
                raise OSError("a killed process opens nothing")
            if self.dead:
                return None  # and cleans nothing up
            target = Path(str(rest[0])) if name == "save_file" else first
            if name == "open" and rest[:1] != ("ab",):
                return call(first, *rest, **named)
            self.calls.append(f"{name} {getattr(target, 'name', '')}".strip())
            if len(self.calls) == self.at:
                if self.torn:
                    tear(name, target, lambda: call(first, *rest, **named))
                self.dead = True
                raise Killed
            return call(first, *rest, **named)

        return watched


def tear(name: str, target: Any, call: Callable[[], object]) -> None:
    """Do half of a call."""
    if name == "fsync" and isinstance(target, int):
        target = Path(f"/proc/self/fd/{target}").resolve()
        if target.name == "ledger.jsonl":
            os.truncate(target, target.stat().st_size - 20)
    elif name in {"write_text", "write_bytes", "save_file"}:
        call()
        os.truncate(target, target.stat().st_size // 2)


@contextmanager
def reaping(reaper: Reaper) -> Iterator[None]:
    """Let every call that changes the disk pass by the reaper."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "write_text", "write_bytes", "replace", "unlink", "open"):
            patch.setattr(Path, name, reaper.watch(name, getattr(Path, name)))
        # Nothing is flushed in earnest: that is most of the time of a run this small.
        patch.setattr(os, "fsync", reaper.watch("fsync", lambda _: None))
        patch.setattr("fedraclora.weights.files.save_file", reaper.watch("save_file", save_file))
        yield


def config(name: str, folder: Path) -> Plain:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        words = [*METHODS[name], *JOB, f"output.dir={folder}", "resume=auto"]
        plain = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def moved(plain: Plain, folder: Path) -> Plain:
    output = plain["output"]
    assert isinstance(output, dict)
    return {**plain, "output": {**output, "dir": str(folder)}}


def digests(folder: Path) -> tuple[object, ...]:
    """What must come out the same: weights, ledger, and every link of the chain."""
    summary = summary_of(folder)
    chain = [
        (round_, meta, {n: t.tolist() for n, t in tensors.items()})
        for round_, tensors, meta in read_links(folder / "chain")
    ]
    rows = digest_rows(read_ledger(folder / "ledger.jsonl"))
    assert rows == summary["ledger_digest"]
    return summary["weights_digest"], rows, chain


def killed_run(plain: Plain, reaper: Reaper) -> bool:
    """Run, or go on with, a job under a reaper; tell whether it was killed."""
    with reaping(reaper):
        try:
            run_one(plain, [], None)
        except Killed:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "torn"),
    [
        pytest.param("fed_rac_lora", False, marks=pytest.mark.long),
        ("fed_rac_lora", True),
        pytest.param("pool_rac_lora", False, marks=pytest.mark.long),
        pytest.param("fedavg_lora", False, marks=pytest.mark.long),
        pytest.param("moments", False, marks=pytest.mark.long),
        pytest.param("basis of the last link", False, marks=pytest.mark.long),
        pytest.param("fewer bits", False, marks=pytest.mark.long),
        pytest.param("pool in fewer bits", False, marks=pytest.mark.long),
    ],
)
def test_a_run_that_dies_at_any_write_goes_on_to_the_same_end(
    name: str, torn: bool, tmp_path: Path
) -> None:
    plain = config(name, tmp_path / "whole")
    watcher = Reaper()
    assert not killed_run(plain, watcher)
    wanted = digests(tmp_path / "whole")
    assert len(watcher.calls) > 40
    wrong = []
    for at, call in enumerate(watcher.calls, start=1):
        if torn and not call.startswith(("write", "save", "fsync")):
            continue
        folder = tmp_path / f"{at}"
        assert killed_run(moved(plain, folder), Reaper(at, torn))
        try:
            assert not killed_run(moved(plain, folder), Reaper())
            if digests(folder) != wanted:
                wrong.append(f"killed at {call} ({at}): another result")
        except Exception as error:  # every window is wanted, not the first
            wrong.append(f"killed at {call} ({at}): {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_run_may_die_again_while_it_goes_on(tmp_path: Path) -> None:
    plain = config("fed_rac_lora", tmp_path / "whole")
    assert not killed_run(plain, Reaper())
    wanted = digests(tmp_path / "whole")
    rng = generator(0, "kills")
    for trial in range(12):
        folder = tmp_path / f"{trial}"
        for _ in range(4):
            reaper = Reaper(int(rng.integers(1, 50)), bool(rng.integers(2)))
            if not killed_run(moved(plain, folder), reaper):
                break
        assert not killed_run(moved(plain, folder), Reaper())
        assert digests(folder) == wanted, trial


@pytest.mark.long  # that a run may die at any write, see above; a process, see test_file_kills
@pytest.mark.parametrize("times", [1, 3])
def test_a_killed_process_goes_on_to_the_same_end(
    times: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill_resume, "JOB", JOB)  # synthetic data: the fewest imports
    # Of this seed, all moments lie in the last fifth of the run: past the imports.
    words = ["--times", str(times), "--kills", "1", "--seed", "147", "rounds=40"]
    status = kill_resume.main(words)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"{times} of {times} runs, killed {times} times in all" in printed


def test_a_difference_is_seen_and_ends_in_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([{"weights_digest": "a", "ledger_digest": "b"}])
    monkeypatch.setattr(kill_resume, "finish", lambda *_: next(found))
    monkeypatch.setattr(kill_resume, "launch", lambda *_, **__: None)
    bad = kill_resume.Trial(1, [kill_resume.Kill(0.5, "nothing")])
    other = {"weights_digest": "a", "ledger_digest": "c"}
    monkeypatch.setattr(kill_resume, "kill_and_resume", lambda *_, **__: (bad, other))
    assert kill_resume.main(["--times", "1"]) == 1
    assert "ledger_digest differ" in capsys.readouterr().out
