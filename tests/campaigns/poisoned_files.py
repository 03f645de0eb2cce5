"""Run folders, presets and check files of others that name harmful code: nothing of it may run.

    python -m tests.campaigns.poisoned_files --times 500 --seed 0

Each case poisons a file by up to three keys and gives it to a command, in a forked process, or to a
function of Python. The payloads are classes and functions of the standard library and of installed
packages, what modules hold of others, modules beside the file and in the working folder; tags of
YAML, ``_target_``, resolvers, keys of Hydra, pickles. Each would write a file. What can be wrong is

    executed    that file is there, or a secret of the environment was written or said
    traceback   an error that nobody foresaw
    words       a refusal that is no sentence
    taken       a command that would have run the code did not refuse
    unnamed     a refusal that leaves out a name that would have been called
    hung, died  no end within the limit of time, or none with a word

The status is non-zero if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import fedraclora
from fedraclora.commands import cli
from fedraclora.errors import FedRacLoraError
from fedraclora.rng import generator
from fedraclora.run.digests import write_digests
from fedraclora.strategies.weights import load_weights
from tests.campaigns.objects import is_sentence

SECONDS = 60  # of the processor, for one case
SECRET = "do-not-tell-5d1f"
MARK = "@"  # in parameters: the file that must not be there
SMALL = ("data=digits", "data.labels=null", "pretrain=none", "partition=iid", "model.hidden=[6]")
SMALL += (
    "clients=4",
    "clients_per_round=4",
    "rounds=1",
    "output.plots=false",
    "output.progress=false",
)

# What is named, and parameters with which its call would leave a file.
NAMES: Mapping[str, Mapping[str, object]] = {
    "subprocess:Popen": {"args": ["touch", MARK]},
    "subprocess:run": {"args": ["touch", MARK]},
    "subprocess:check_output": {"args": ["touch", MARK]},
    "os:system": {"command": f"touch {MARK}"},
    "os:mkdir": {"path": MARK},
    "posix:mkdir": {"path": MARK},
    "builtins:open": {"file": MARK, "mode": "w"},
    "builtins:exec": {"source": f"open({MARK!r}, 'w')"},
    "io:open": {"file": MARK, "mode": "w"},
    "io:FileIO": {"file": MARK, "mode": "w"},
    "logging:FileHandler": {"filename": MARK},
    "runpy:run_path": {"path_name": "beside.py"},
    "importlib:import_module": {"name": "victim"},
    "timeit:timeit": {"stmt": f"open({MARK!r}, 'w')"},
    "pdb:run": {"statement": f"open({MARK!r}, 'w')"},
    "zipfile:ZipFile": {"file": MARK, "mode": "w"},
    "sqlite3:connect": {"database": MARK},
    "multiprocessing.shared_memory:SharedMemory": {"create": True, "size": 8},
    "torch:load": {"f": "evil.pkl", "weights_only": False},
    "torch:save": {"obj": 1, "f": MARK},
    "torch.hub:load": {"repo_or_dir": ".", "model": "touch", "source": "local"},
    "torch.serialization:load": {"f": "evil.pkl", "weights_only": False},
    "torch.utils.cpp_extension:load": {"name": "x", "sources": ["x.cpp"]},
    "torch.utils.cpp_extension:subprocess": {},
    "torch.nn.modules.module:torch": {},
    "torch.nn.functional:importlib": {},
    "torch.nn:Module": {},
    "torchmetrics.utilities.imports:sys": {},
    "flwr_datasets.partitioner:Partitioner": {},
    "numpy:load": {"file": "evil.pkl", "allow_pickle": True},
    "numpy:save": {"file": MARK, "arr": [1]},
    "pandas:read_pickle": {"filepath_or_buffer": "evil.pkl"},
    "yaml:unsafe_load": {"stream": f"!!python/object/apply:os.mkdir [{MARK}]"},
    "hydra.utils:instantiate": {"config": {"_target_": "os.mkdir", "path": MARK}},
    "cloudpickle:loads": {"data": "x"},
    "fedraclora.commands.init.command:write_project": {"name": "canary", "where": "."},
    "fedraclora.run.folder:subprocess": {},
    "fedraclora.run.folder:make": {"folder": MARK},
    "fedraclora.imports:import_object": {"key": "x", "name": "victim:touch"},
    "helper:Popen": {"args": ["touch", MARK]},
    "helper:system": {"command": f"touch {MARK}"},
    "helper:subprocess": {},
    "linked:Popen": {"args": ["touch", MARK]},
    "victim:touch": {},
    "victim:Touch": {},
    "victim.deep:touch": {},
    "beside:touch": {},
}
# Modules in the working folder: one of the user's, that is not trusted here, and one that takes
# the names of others in.
VICTIM = """
import os, pathlib
pathlib.Path(os.environ["CANARY"]).write_text("imported")
def touch(*args, **kwargs):
    pathlib.Path(os.environ["CANARY"]).write_text("called")
class Touch:
    def __init__(self, *args, **kwargs):
        touch()
"""
HELPER = "import subprocess\nfrom os import system\nfrom subprocess import Popen\n"
# Keys that may name code, with the keys beside which parameters stand; and how they are said.
KEYS: Mapping[str, str | None] = {
    **dict.fromkeys(("method.name", "local.name", "partition.name", "aggregator.name")),
    **dict.fromkeys(("server_optimizer.name", "attack.name", "data.name", "model.name")),
    "local.train": "local.parameters",
    "model.function": "model.parameters",
    "data.function": "data.parameters",
    "data.samples": "data.parameters",
    "data.test_function": "data.parameters",
    "data.loss": "",
    "data.metrics": "[]",
    "local.extras": "[]",
    "callbacks": "[]",
    "steps": "[]",
}
# Poison that names nothing: text that is put into a file, or a file beside it.
TEXTS: Mapping[str, str] = {
    "tag_apply": "zz: !!python/object/apply:os.mkdir ['@']\n",
    "tag_new": "zz: !!python/object/new:subprocess.Popen [['touch', '@']]\n",
    "tag_name": "zz: !!python/name:os.system\n",
    "tag_module": "zz: !!python/module:victim\n",
    "target": "zz: {_target_: os.mkdir, path: '@'}\n",
    "resolver_env": "zz: '${oc.env:SECRET}'\n",
    "resolver_nested": "zz: {a: ['${oc.decode:${oc.env:SECRET}}']}\n",
    "resolver_create": "zz: '${oc.create:{_target_: os.mkdir}}'\n",
    "hydra_callback": "hydra: {callbacks: {zz: {_target_: victim.Touch}}}\n",
    "hydra_launcher": "hydra: {launcher: {_target_: victim.Touch}}\n",
    "hydra_sweeper": "hydra: {sweeper: {_target_: victim.Touch}}\n",
    "hydra_logging": "hydra: {job_logging: {version: 1, handlers: {zz: {(): victim.touch}}}}\n",
    "hydra_env": "hydra: {job: {env_set: {ZZ: '${oc.env:SECRET}'}}}\n",
    "merged": "<<: {data: {loss: {name: 'subprocess:Popen', args: [touch, '@']}}}\n",
    "anchored": "zz: &a {name: 'os:mkdir', path: '@'}\nyy: [*a, *a]\n",
}
PICKLES = ("objects.pkl", "checkpoint/checkpoint.safetensors", "checkpoint.pt", "ledger.jsonl")
PICKLES += ("chain/00000001.safetensors", "private/secret", "summary.json", "digests.json")

# Commands that read a run folder; those that begin with "=" build what its config says.
ON_FOLDERS: Mapping[str, Sequence[str]] = {
    "=resume": ("simulate", "resume={}", "rounds=2"),
    "=evaluate": ("evaluate", "{}"),
    "=predict": ("predict", "{}", "--data", "test"),
    "=export": ("export", "{}", "--no-check"),
    "=export_hf": ("export", "{}", "--format", "hf"),
    "start": ("simulate", "init_from={}", *SMALL, "output.dir=other"),
    "=deploy": ("deploy", "nodes=2", "resume={}"),
    "=deploy_check": ("deploy", "--check", "nodes=2", "resume={}"),
    "auto": ("simulate", *SMALL, "resume=auto", "output.dir={}"),
    "compare": ("compare", "{}", "{}"),
    "report": ("report", "{}"),
    "compact": ("compact", "{}"),
    "tune": ("tune", *SMALL, "output.dir={}", "tune.runs=1"),
    "study": ("study", "{}/study.yaml"),
}
IN_PYTHON: Mapping[str, Callable[[Path], object]] = {
    "=read_run": fedraclora.read_run,
    "=load_weights": load_weights,
    "going_on": lambda folder: fedraclora.simulate(*SMALL, folder=folder, resume=True, rounds=2),
    "beginning": lambda folder: fedraclora.simulate(*SMALL, init_from=str(folder)),
}
ON_PRESETS: Mapping[str, Sequence[str]] = {
    "=simulate": ("simulate", "--config-dir", "{}", "experiment=evil", *SMALL, "output.dir=other"),
    "=sweep": ("simulate", "-m", "--config-dir={}", "experiment=evil", "seed=0,1", *SMALL),
    "=shown": ("simulate", "--config-dir", "{}", "experiment=evil", "--cfg", "job"),
    "=info": ("simulate", "--config-dir", "{}", "experiment=evil", "--info=defaults"),
    "=searched": ("simulate", "hydra.searchpath=[file://{}]", "experiment=evil", *SMALL),
    "=primary": ("simulate", "--config-path", "{}", "--config-name", "evil"),
    "=compare_preset": (
        "compare",
        "method=fedavg,ffa_lora",
        "--config-dir",
        "{}",
        "experiment=evil",
    ),
    "=deploy_preset": ("deploy", "nodes=2", "--config-dir", "{}", "experiment=evil"),
    "=tune_preset": ("tune", "--config-dir", "{}", "experiment=evil", "output.dir=other"),
    "helped": ("simulate", "--help", "--config-dir", "{}", "experiment=evil"),
    "=words": (),
}
ON_CHECKS: Mapping[str, Sequence[str]] = {
    "=node": ("node", "--check={}", "--superlink", "127.0.0.1:9", "--insecure", "--node-config"),
}


@dataclass(frozen=True)
class Case:
    """A poisoned file, and who reads it.

    Attributes:
        command: Of `ON_FOLDERS`, `IN_PYTHON`, `ON_PRESETS` or `ON_CHECKS`.
        named: Name of `NAMES` by key of `KEYS`, and whether parameters stand beside it.
        beside: Poison of `TEXTS`, or a file of `PICKLES`.
    """

    command: str
    named: Mapping[str, tuple[str, bool]]
    beside: str = ""

    @property
    def must(self) -> bool:
        """Whether the command would run what is named, and so refuses it."""
        return self.command.startswith("=") and bool(self.named)


@dataclass(frozen=True)
class Ended:
    """How a case ended: with which status, and what was said; ``status`` may name a signal."""

    status: int | str
    said: str = ""
    traced: bool = False


def drawn(seed: int, number: int) -> Case:
    """Draw a case."""
    rng = generator(seed, "poisoned", number)

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    tables = ([*ON_FOLDERS, *IN_PYTHON], [*ON_PRESETS], [*ON_CHECKS])
    command = pick(tables[int(rng.choice([0, 0, 0, 1, 1, 2]))])
    beside = ""
    if rng.random() < 0.35:
        beside = pick([*TEXTS, *(PICKLES if command in tables[0] else ())])
    count = int(rng.choice([0, 1] if beside else [1, 1, 2, 3]))
    keys = dict.fromkeys(pick([*KEYS]) for _ in range(count))
    return Case(command, {key: (pick([*NAMES]), bool(rng.random() < 0.7)) for key in keys}, beside)


# ---- Making -------------------------------------------------------------------------------------


def with_mark(value: Any, canary: Path) -> Any:
    """Put the canary's place into parameters."""
    if isinstance(value, str):
        return value.replace(MARK, str(canary))
    if isinstance(value, list):
        return [with_mark(each, canary) for each in value]
    if isinstance(value, Mapping):
        return {key: with_mark(each, canary) for key, each in value.items()}
    return value


def poison(config: dict[str, Any], case: Case, canary: Path) -> dict[str, Any]:
    """Write what a case names into a config, in place."""
    for key, (name, whole) in case.named.items():
        group, _, leaf = key.partition(".")
        given = with_mark(NAMES[name], canary) if whole else {}
        home, beside = (config.setdefault(group, {}), KEYS[key]) if leaf else (config, "[]")
        place = leaf or group
        if beside is None:
            home |= {**given, place: name}
        elif beside in {"", "[]"}:
            value = {**given, "name": name} if given else name
            home[place] = [value] if beside else value
        else:
            home |= {place: name, beside.partition(".")[2]: given}
    return config


class Evil:
    """Makes the canary's folder where it is unpickled."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how it is made."""
        return os.mkdir, (self.place,)


def made(case: Case, run: Path, home: Path, canary: Path) -> Path:
    """Write the poisoned file of a case; give what the command is told."""
    (home / "victim.py").write_text(VICTIM)
    (home / "helper.py").write_text(HELPER)
    (home / "linked.py").symlink_to(os.path.realpath(str(sys.modules["subprocess"].__file__)))
    pickled = pickle.dumps({"object": Evil(str(canary))})
    (home / "evil.pkl").write_bytes(pickled)
    text = with_mark(TEXTS.get(case.beside, ""), canary)
    theirs = home.parent / "theirs"
    if case.command in {**ON_FOLDERS, **IN_PYTHON}:
        shutil.copytree(run, theirs)
        config = yaml.safe_load((theirs / "config.yaml").read_text())
        told = yaml.safe_dump(poison(config, case, canary)) + text
        write_digests(theirs, told, None)  # as somebody who knows the project would
        (theirs / "config.yaml").write_text(told)
        (theirs / "beside.py").write_text(VICTIM)
        (theirs / "study.yaml").write_text(yaml.safe_dump({"runs": config}) + text)
        if case.beside in PICKLES:
            (theirs / case.beside).parent.mkdir(exist_ok=True)
            (theirs / case.beside).write_bytes(pickled)
        return theirs
    config = poison({}, case, canary)
    theirs.mkdir()
    (theirs / "beside.py").write_text(VICTIM)
    if case.command in ON_CHECKS:
        whole = yaml.safe_load((run / "config.yaml").read_text())
        text = yaml.safe_dump({"versions": {}, "config": poison(whole, case, canary)}) + text
        (theirs / "check.yaml").write_text(text)
        return theirs / "check.yaml"
    head = "# @package _global_\n"
    (theirs / "experiment").mkdir()
    chosen = [{f"override /{k[:-5]}": n} for k, (n, _) in case.named.items() if k in CHOSEN]
    defaults = yaml.safe_dump({"defaults": chosen}) if chosen else ""
    body = yaml.safe_dump(config) if config else ""
    (theirs / "experiment" / "evil.yaml").write_text(head + defaults + body + text)
    (theirs / "evil.yaml").write_text(defaults + body + text)
    return theirs


CHOSEN = ("method.name", "partition.name", "attack.name", "data.name", "model.name")


# ---- Trying -------------------------------------------------------------------------------------


def attempt(case: Case, run: Path, home: Path) -> Ended:
    """Give a poisoned file to its command, in a process of its own."""
    shutil.rmtree(home, ignore_errors=True)
    (home / "work").mkdir(parents=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _in_child(case, run, home)
    status: int | str = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if isinstance(status, int) and status < 0:
        return Ended(signal.Signals(-status).name)
    told = home / "ended"
    found: Ended = pickle.loads(told.read_bytes()) if told.exists() else Ended("nothing")
    return found


def _in_child(case: Case, run: Path, home: Path) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(3 * SECONDS)
        canary, work = home / "canary", home / "work"
        os.environ |= {"CANARY": str(canary), "SECRET": SECRET, "HYDRA_FULL_ERROR": "1"}
        os.chdir(work)
        place = made(case, run, work, canary)
        with (
            (home / "said").open("w", errors="backslashreplace") as said,
            redirect_stderr(said),
            redirect_stdout(said),
        ):
            logging.basicConfig(stream=said, force=True)
            status = called(case, place)
        text = (home / "said").read_text(errors="replace")
        traced = "Traceback" in text or "this is a bug" in text
        (home / "ended").write_bytes(pickle.dumps(Ended(status, text, traced)))
    finally:
        os._exit(0 if (home / "ended").exists() else 97)


def called(case: Case, place: Path) -> int:
    """Call what reads a file; give its status."""
    try:
        if case.command in IN_PYTHON:
            IN_PYTHON[case.command](place)
        elif case.command == "=words":
            fedraclora.simulate(f"hydra.searchpath=[file://{place}]", "experiment=evil", *SMALL)
        else:
            words = {**ON_FOLDERS, **ON_PRESETS, **ON_CHECKS}[case.command]
            more = ["partition-id=0"] if case.command in ON_CHECKS else []
            cli.main([*(word.replace("{}", str(place)) for word in words), *more])
    except SystemExit as end:
        return int(end.code or 0)
    except FedRacLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def judged(case: Case, ended: Ended, home: Path) -> str | None:
    """Say what is wrong with how a case ended; None if nothing is."""
    if (home / "canary").exists() or (home / "work" / "canary").exists():
        return "executed"
    files = (path for path in home.rglob("*") if path.is_file() and path.name != "ended")
    if any(SECRET.encode() in path.read_bytes() for path in files):
        return "executed: the secret was told"
    if isinstance(ended.status, str):
        return "hung" if ended.status in {"SIGXCPU", "SIGALRM"} else f"died: {ended.status}"
    if ended.traced:
        return f"traceback: {ended.said.strip().splitlines()[-1][:120]}"
    return refused(case, ended)


def refused(case: Case, ended: Ended) -> str | None:
    """Say what is wrong with a refusal, or with what was taken."""
    refusals = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if ended.status == 1 and not all(map(is_sentence, refusals)):
        return f"words: {refusals[0][:120]}"
    if not case.must:
        return None
    if not ended.status:
        return "taken"
    names = [name for name, _ in case.named.values()]
    # A file that cannot be read as YAML, or that sets keys of Hydra, is refused before its names.
    early = case.beside.startswith(("tag_", "hydra_")) or case.beside in (*PICKLES, "merged")
    if not early and (left := [name for name in names if name not in ended.said]):
        return f"unnamed: {left[0]}: {ended.said.strip()[-160:]}"
    return None


# ---- All of it ----------------------------------------------------------------------------------


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """Make the run whose folder is poisoned, which also loads libraries before processes fork."""
    with tempfile.TemporaryDirectory(prefix="fedraclora-poisoned-") as made_:
        place = Path(made_)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            fedraclora.simulate(*SMALL, folder=place / "run")
        gc.freeze()
        yield place


def campaign(numbers: Sequence[int], seed: int) -> Iterator[tuple[str, Case]]:
    """Draw, try and judge cases; give each failure."""
    began, ends = time.monotonic(), Counter[str]()
    with prepared() as place:
        for done, number in enumerate(numbers, 1):
            case = drawn(seed, number)
            ended = attempt(case, place / "run", place / "case")
            ends["refused" if ended.status else "harmless"] += 1
            if (kind := judged(case, ended, place / "case")) is not None:
                print(f"case {number}: {kind}: {case}", flush=True)
                yield kind, case
            if done % 100 == 0 or done == len(numbers):
                print(f"{done} cases in {time.monotonic() - began:.0f} s: {dict(ends)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--times", type=int, default=500, help="cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    found: dict[str, list[Case]] = defaultdict(list)
    for kind, case in campaign(range(asked.first, asked.first + asked.times), asked.seed):
        found[kind.partition(":")[0]].append(case)
    count = sum(map(len, found.values()))
    print(f"{asked.times} cases, {count} failures of {len(found)} kinds")
    for kind, cases in sorted(found.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(cases):6d}  {kind}: {cases[0]}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
