"""What the files of docs/deploy name, which people paste: commands, flags, versions, files."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from flwr.common.config import parse_config_args
from packaging.requirements import Requirement

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.engines.node_config import served
from fedraclora.strategies.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "deploy"
UNITS = sorted(FOLDER.glob("*.service"))
SCRIPTS = sorted(FOLDER.glob("slurm/*.sh"))
DOCUMENTS = [
    (file.name, document)
    for file in sorted(FOLDER.rglob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
]
PAUSE = ["sleep", "infinity"]  # of what holds a network, and never ends
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def inside(value: Any, key: str) -> list[Any]:
    """All values of a key, however deep it lies."""
    if isinstance(value, list):
        return [found for part in value for found in inside(part, key)]
    if not isinstance(value, dict):
        return []
    deeper = [found for part in value.values() for found in inside(part, key)]
    return [*deeper, *([value[key]] if key in value else [])]


def joined(text: str) -> list[str]:
    """The lines of a file, with those that a backslash ends joined to the next."""
    return text.replace("\\\n", " ").splitlines()


def commands() -> list[list[str]]:
    """Command lines of all recipes, without the folder of a program."""
    found = [c for _, d in DOCUMENTS for key in ("command", "args") for c in inside(d, key)]
    for unit in UNITS:
        (line,) = re.findall(r"^ExecStart=(.*)$", "\n".join(joined(unit.read_text())), re.MULTILINE)
        found.append(shlex.split(line))
    found += [shlex.split(job) for _, d in DOCUMENTS for job in inside(d, "entrypoint")]
    return [[Path(words[0]).name, *words[1:]] for words in found if words != PAUSE]


COMMANDS = commands()
# What stands in a shell for an address or a number.
SHELL = {'"$ip:$port"': "10.0.0.1:6379", '"$address"': "10.0.0.1:6379", '"$ip"': "10.0.0.1"}


def of_shell(script: Path, program: str) -> list[list[str]]:
    """The command lines of a program in a script."""
    text = "\n".join(joined(script.read_text()))
    for name, value in SHELL.items():
        text = text.replace(name, value)
    text = re.sub(r'"\$\{?\w+(?::-1)?\}?"', "2", text).replace('"$@"', "rounds=2")
    lines = [line.partition(" &")[0].partition("> ")[0] for line in text.splitlines()]
    lines = [line for line in lines if not line.startswith("#")]
    return [shlex.split(line[line.index(program) :]) for line in lines if program in line]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_each_command_is_one_and_takes_its_flags(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "flower-superlink":
        from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

        args = _parse_args_run_superlink().parse_args(words[1:])
        assert args.host == "127.0.0.1"
        assert args.enable_supernode_auth
        assert args.database
    elif words[:2] == ["fedraclora", "node"]:
        from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

        args = _parse_args_run_supernode().parse_args(words[2:])
        assert args.auth_supernode_private_key
        assert args.root_certificates
        config = parse_config_args([args.node_config])
        assert served(config)
        assert {*config} <= {"partition-id", "partition-ids", "data", "cache"}
    else:
        assert words[:2] == ["fedraclora", "simulate"]
        from_plain(composed(words[2:]), METHODS)


def test_the_run_that_a_comment_starts_is_one() -> None:
    text = (FOLDER / "compose.yaml").read_text().replace("\\\n#", " ")
    (line,) = re.findall(r"exec superlink fedraclora deploy connection=house (.*)", text)
    words = shlex.split(line)
    assert {"data=own", "clients=3"} <= {*words}
    from_plain(composed(["engine=deploy", *words]), METHODS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_for_slurm_take_flags_of_ray_and_keys_of_a_run(script: Path) -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    known = {o for command in (start, symmetric_run) for p in command.params for o in p.opts}
    for words in of_shell(script, "ray start") + of_shell(script, "ray symmetric-run"):
        own = words[: words.index("--")] if "--" in words else words
        flags = {word.partition("=")[0] for word in own if word.startswith("--")}
        assert flags <= known
        assert flags & {"--head", "--address"}
    (words,) = of_shell(script, "fedraclora simulate")
    from_plain(composed(words[2:]), METHODS)
    assert "RAY_AUTH_MODE=token" in script.read_text()


def test_pinned_versions_are_those_that_the_project_takes_and_that_were_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (FOLDER / "constraints.txt").read_text(), re.MULTILINE)
    )
    extras = project["optional-dependencies"]
    for wanted in map(Requirement, project["dependencies"] + extras["privacy"] + extras["report"]):
        pin = pins[wanted.name.lower().replace("_", "-")]
        assert wanted.specifier.contains(pin), wanted
    for name in ("flwr", "ray", "torch", "numpy"):
        assert version(name).partition("+")[0] == pins[name], name
    (python,) = re.findall(r"^ARG BASE=python:(\d+\.\d+)\.\d+", DOCKERFILE, re.MULTILINE)
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)
    images = {i for _, d in DOCUMENTS for i in inside(d, "image") if "fedraclora" in i}
    assert images == {f"fedraclora:{project['version']}"}
    (ray,) = {r for _, d in DOCUMENTS for r in inside(d, "rayVersion")}
    assert ray == pins["ray"]


def test_what_is_copied_into_an_image_is_there() -> None:
    wanted = re.findall(r"^!(\S+)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert wanted
    assert [path for path in wanted if not (ROOT / path).exists()] == []
    needed = {"fedraclora", "pyproject.toml", "README.md"}
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    needed |= {
        str(p.resolve().relative_to(ROOT))
        for p in (ROOT / "fedraclora").iterdir()
        if p.is_symlink() and f"/fedraclora/{p.name}" not in built["exclude"]
    }
    assert {path.partition("/")[0] for path in needed} <= {*wanted}
    assert "USER 10001:10001" in DOCKERFILE


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_certificates_are_renewed_under_an_authority_that_lasts(tmp_path: Path) -> None:
    """A renewed certificate needs no new ``ca.crt``; both authorities in one file accept either."""

    def made(folder: Path) -> bytes:
        folder.mkdir(exist_ok=True)
        words = ["sh", str(FOLDER / "certificates.sh"), "link.example.org", str(folder)]
        subprocess.run(words, check=True, capture_output=True)
        return (folder / "server.pem").read_bytes()

    def accepts(authorities: bytes, certificate: bytes) -> bool:
        (tmp_path / "ca").write_bytes(authorities)
        (tmp_path / "pem").write_bytes(certificate)
        words = ["openssl", "verify", "-CAfile", str(tmp_path / "ca"), str(tmp_path / "pem")]
        return subprocess.run(words, check=False, capture_output=True).returncode == 0

    first = made(tmp_path / "old")
    old = (tmp_path / "old" / "ca.crt").read_bytes()
    renewed, other = made(tmp_path / "old"), made(tmp_path / "new")
    new = (tmp_path / "new" / "ca.crt").read_bytes()
    assert renewed != first
    assert (tmp_path / "old" / "ca.crt").read_bytes() == old
    assert accepts(old, renewed)
    assert not accepts(old, other)
    assert accepts(old + new, renewed)
    assert accepts(old + new, other)
    ends = [x509.load_pem_x509_certificate(each).not_valid_after_utc for each in (old, renewed)]
    assert (ends[0] - ends[1]).days > 9 * 365 - 10


def test_services_and_secrets_that_are_named_are_there() -> None:
    compose = dict(DOCUMENTS)["compose.yaml"]
    made = re.findall(r"[\w.]+\.(?:crt|pem|key)\b", (FOLDER / "certificates.sh").read_text())
    for secret in compose["secrets"].values():
        name = Path(secret["file"]).name
        assert name in made or re.fullmatch(r"node\d", name)
    for service in compose["services"].values():
        assert {*service.get("depends_on", [])} <= {*compose["services"]}
        named = [s if isinstance(s, str) else s["source"] for s in service.get("secrets", [])]
        assert {*named} <= {*compose["secrets"]}
        # What Compose refuses, once something runs: docker compose config takes it.
        wanted = service.get("configs", []) if service.get("read_only") else []
        for config in wanted:
            assert not {"uid", "gid", "mode"} & {*config}
            assert "content" not in compose["configs"][config["source"]]
        if shared := service.get("network_mode", "").partition("service:")[2]:
            owner = compose["services"][shared]  # whose restart would cut the others off for good
            assert owner["command"] == PAUSE
            assert not {"ports", "networks"} & {*service}
    for config in compose["configs"].values():
        assert (FOLDER / config["file"]).is_file()
    for _, document in DOCUMENTS:
        volumes = {v["name"] for part in inside(document, "volumes") if isinstance(part, list)
                   for v in part if isinstance(v, dict)}  # fmt: skip
        mounts = {m["name"] for part in inside(document, "volumeMounts") for m in part}
        assert mounts <= volumes


def test_all_proxies_forward_one_path_alone() -> None:
    here = (FOLDER / "nginx.conf").read_text().partition("\n")[2]
    (there,) = [d["data"]["default.conf"] for _, d in DOCUMENTS if d.get("kind") == "ConfigMap"]
    assert there == here.replace("listen 443", "listen 8443")
    assert re.findall(r"location (\S+)", here) == ["/v1/fleet/", "/"]
    assert re.findall(r"return (\d+);", here) == ["404"]


def test_every_recipe_is_on_a_page() -> None:
    pages = (ROOT / "docs" / "deploy.md").read_text() + (ROOT / "docs" / "cluster.md").read_text()
    named = {*re.findall(r"\(deploy/([^)#]+)\)", pages)}
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    missing = [
        f
        for f in files
        if not {str(f.relative_to(FOLDER)), str(f.parent.relative_to(FOLDER))} & named
    ]
    assert [f.name for f in missing if f.name != "Dockerfile.dockerignore"] == []
