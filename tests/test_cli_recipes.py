"""Every `revdist` line in launch/ and in the documents is one that the command understands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from revdist import cli

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "launch").iterdir() if path.is_file())
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"revdist (?:launch|plan|devices|report|doctor)\b[^'`#&|]*")
PLACEHOLDER = {'"$CONFIG"': "configs/run.yaml", '"${OVERRIDES[@]}"': "seed=1", '"${RESUME[@]}"': "--resume"}


def commands(path: Path) -> list[str]:
    """The `revdist` commands of a file: shell lines, or lines and spans set as code in Markdown."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^ {4}.*$|^```.*?^```|`[^`\n]+`", text, flags=re.M | re.S))
    found = (match.strip() for line in text.splitlines() for match in COMMAND.findall(line))
    return [command for command in found if not command.endswith(("launch", "plan", "report"))]


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


@pytest.mark.parametrize("path", [path for path in RECIPES if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_job_scripts_are_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_cluster_files_match_ray_s_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import ray.autoscaler

    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema.read_text()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_readme_lists_every_recipe(path: Path) -> None:
    assert path.name == "README.md" or f"`{path.name}`" in (ROOT / "launch" / "README.md").read_text()
