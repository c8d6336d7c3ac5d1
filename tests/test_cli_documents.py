"""The documents say what there is, all of it and nothing more."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pydantic

from revdist.config import RunConfig

ROOT = Path(__file__).parent.parent


def keys(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, entries of lists as `devices.N.kind`."""
    for name, field in model.model_fields.items():
        sections = list(sections_in(field.annotation))
        if not sections or field.annotation not in sections:
            yield prefix + name
        for section in sections:
            in_list = section is not field.annotation
            yield from keys(section, f"{prefix}{name}.{'N.' if in_list else ''}")


def sections_in(annotation: object) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from sections_in(argument)


def documented() -> set[str]:
    """What the tables of configuration.md are about."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|", text, flags=re.M)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_every_configuration_key_is_documented_and_no_other() -> None:
    assert {key for key in documented() if not key.isupper()} == set(keys(RunConfig))


def test_every_environment_variable_is_documented_and_no_other() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "revdist").rglob("*.py"))
    variables = {key for key in documented() if key.isupper()}
    assert not set(re.findall(r'environ\.get\("(REVDIST_\w+)"', code)) - variables
    assert not {name for name in variables if f'"{name}"' not in code}


def test_the_readme_maps_every_folder() -> None:
    text = (ROOT / "README.md").read_text()
    folders = [path for path in (ROOT / "revdist").iterdir() if (path / "__init__.py").exists()]
    missing = [path.name for path in folders if not re.search(rf"^\s+{path.name}/ ", text, flags=re.M)]
    assert not missing
