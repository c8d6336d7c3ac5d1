"""How a configuration is written down: YAML, and `key.sub=value` for single keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from revdist.errors import ConfigError


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError."""
    try:
        values = _read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}: check the path, or start from one in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(values).__name__}")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """The text that is read back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def override(values: dict[str, Any], text: str) -> None:
    """Apply one `key.sub=value`, the value being YAML. Raises ConfigError."""
    key, separator, written = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {text!r} must read key=value, for example global_batch=64")
    try:
        value = _read(written)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from None
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = _step_into(place, parent, text)
    if isinstance(place, list):
        place[_index(place, last, text)] = value
    else:
        place[last] = value


def _step_into(place: Any, name: str, text: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, name, text)]
    below = place.setdefault(name, {})
    if not isinstance(below, dict | list):
        raise ConfigError(f"override {text!r}: {name} is a value, not a section")
    return below


def _index(place: list[Any], name: str, text: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise ConfigError(f"override {text!r}: the list has entries 0 to {len(place) - 1}, not {name}")
    return int(name)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which `1e-3` is a number as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+|\.[0-9]+)$"),
        list("-+.0123456789"),
    )


def _read(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
