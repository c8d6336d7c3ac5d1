"""Every `revdist` line in launch/ and in the documents is one that the command understands."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from revdist import cli
from revdist.cluster.processes import writing_below
from revdist.training.run_directory import RunReader

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "launch").iterdir() if path.is_file() and path.name != "Dockerfile")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"revdist (?:launch|plan|devices|report|doctor|status|attach|logs|stop)\b[^'`#&|]*")
PLACEHOLDER = {'"$CONFIG"': "configs/run.yaml", '"${OVERRIDES[@]}"': "seed=1", '"${RESUME[@]}"': "--resume"}


def commands(path: Path) -> list[str]:
    """The `revdist` commands of a file: shell lines, or lines and spans set as code in Markdown."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^ {4}.*$|^```.*?^```|`[^`\n]+`", text, flags=re.M | re.S))
    found = (match.strip() for line in text.splitlines() for match in COMMAND.findall(line))
    return [command for command in found if is_whole(command)]


def is_whole(command: str) -> bool:
    """Whether it can be typed as it stands, and is not a mention of a command or one of its options."""
    _, name, *arguments = command.split()
    return name in ("devices", "doctor") or any(not argument.startswith("-") for argument in arguments)


CASES = [(path, command) for path in RECIPES + DOCUMENTS if path.exists() for command in commands(path)]


@pytest.mark.parametrize(("path", "command"), CASES, ids=[f"{path.name}: {command}" for path, command in CASES])
def test_the_command_understands_it(path: Path, command: str) -> None:
    for name, value in PLACEHOLDER.items():
        command = command.replace(name, value)
    words = [re.sub(r"\$\{?\w+\}?", "value", word) for word in shlex.split(command)]
    group = typer.main.get_command(cli.app)
    with group.make_context("revdist", words[1:2]) as context:
        subcommand = group.get_command(context, words[1])  # type: ignore[attr-defined]
        subcommand.make_context(words[1], words[2:], parent=context)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_starts_training(path: Path) -> None:
    assert any(command.startswith("revdist launch") for command in commands(path))


SCRIPTS = [path for path in RECIPES if path.suffix in (".sbatch", ".sh")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell_that_stops_at_errors(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_go_on_with_a_run_wherever_its_checkpoints_are(path: Path, tmp_path: Path) -> None:
    (choice,) = re.findall(r"^RESUME=\(\)\n.*", path.read_text(), flags=re.M)
    for resumes in ("", "--resume"):
        script = f'set -euo pipefail\n{choice}\necho "${{RESUME[@]}}"'
        done = subprocess.run(
            ["bash", "-c", script], env={"RUN_DIR": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == resumes
        (tmp_path / "config.yaml").touch()


def test_the_cluster_file_matches_ray_s_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import ray.autoscaler

    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    values = yaml.safe_load((ROOT / "launch" / "ray-aws.yaml").read_text())
    jsonschema.validate(values, json.loads(schema.read_text()))


def test_the_cluster_file_brings_the_token_along() -> None:
    """Every command in a container has the environment that it was started with."""
    values = yaml.safe_load((ROOT / "launch" / "ray-aws.yaml").read_text())
    assert "--env RAY_AUTH_MODE=token" in values["docker"]["run_options"]
    assert values["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.fixture
def rayjob() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "kuberay-rayjob.yaml").read_text())
    return values


JOB_FIELDS = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
CONTAINER_FIELDS = {"name", "image", "env", "resources", "volumeMounts"}


def test_the_rayjob_has_the_fields_of_its_kind_and_no_other(rayjob: dict[str, Any]) -> None:
    """Field names as KubeRay's API reference has them, those that the recipe uses."""
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9-]+", rayjob["metadata"]["name"])
    spec = rayjob["spec"]
    assert set(spec) == JOB_FIELDS
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    assert cluster["rayVersion"] == pinned("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups[1:]:
        assert set(group) == GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert set(container) == CONTAINER_FIELDS
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(one["value"], str) for one in container["env"])
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_rayjob_starts_what_it_says(rayjob: dict[str, Any], tmp_path: Path) -> None:
    """Its entry point, run by the shell with a `revdist` that shows what it was given; then with a run there."""
    fake = tmp_path / "revdist"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    entrypoint = rayjob["spec"]["entrypoint"].replace("/runs/revdist", str(tmp_path / "run"))
    for resumes in (False, True):
        done = subprocess.run(
            entrypoint,
            shell=True,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("launch configs/digits-revnet-2cpu.yaml devices=auto co_tenants=[]")
        assert done.stdout.rstrip().endswith("--resume") is resumes
        assert "checkpoint.every_s=" in done.stdout
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").touch()


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    return str(version)


@pytest.mark.parametrize("name", ["Dockerfile", "ray-aws.yaml"])
def test_images_are_those_of_the_ray_that_is_pinned(name: str) -> None:
    assert f"rayproject/ray:{pinned('ray')}-py311-gpu" in (ROOT / "launch" / name).read_text()


def test_the_image_gets_nothing_that_git_leaves_out() -> None:
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert ".git/" in left_out
    for pattern in (ROOT / ".gitignore").read_text().split():
        assert (pattern[1:] if pattern.startswith("/") else f"**/{pattern}") in left_out


def test_the_cluster_gets_no_environment_and_no_run_of_this_machine() -> None:
    excluded = yaml.safe_load((ROOT / "launch" / "ray-aws.yaml").read_text())["rsync_exclude"]
    made = re.findall(r"^\w*VENV := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    for name in (*made, ".git", "runs"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in excluded), name


FAKE_SSH = """\
#!/bin/bash
while [ "${1#-}" != "$1" ]; do shift 2; done
shift
exec bash -c "$*"
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_ssh_recipe_trains_on_two_nodes_and_ends_them(tmp_path: Path) -> None:
    """For real, but for ssh: a stand-in runs what the other machine would run on this one."""
    own_address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    if not own_address:
        pytest.skip("Ray forms no cluster of several nodes on loopback, and this machine has no other address")
    sys.path.append(str(ROOT / "tests" / "cluster"))
    from runs import settings

    (tmp_path / "ssh").write_text(FAKE_SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "small.yaml").write_text(json.dumps(settings()))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ray_folder = tempfile.mkdtemp(prefix="rs-")  # Ray's socket paths must stay short
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "training")]),
        "RAY_TMPDIR": ray_folder,
        "REVDIST_DEVICES_DIR": str(tmp_path / "devices"),
        "HOME": str(tmp_path),
        "PORT": str(port),
        "RUN_DIR": str(tmp_path / "run"),
    }
    try:
        done = subprocess.run(
            [str(ROOT / "launch" / "ssh.sh"), "other", str(tmp_path / "small.yaml"), "seed=1"],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list(RunReader(tmp_path / "run").metrics())) == 10
        assert (done.stdout + done.stderr).count("received SIGTERM") == 2  # both nodes, and they are gone:
        assert writing_below(ray_folder) == []
    finally:
        for process in writing_below(ray_folder):
            process.send(signal.SIGKILL)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_readme_lists_every_recipe(path: Path) -> None:
    assert path.name == "README.md" or f"`{path.name}`" in (ROOT / "launch" / "README.md").read_text()
