"""Mistakes in `package.module:name` that can be seen without importing anything, before processes are started.

Importing a model takes seconds, and is done by every rank anyway. What is looked at here is whether the
module's file exists, and whether its text defines the name, where the text alone can tell.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from revdist.errors import FactoryError

_MAX_BYTES = 200_000
"""A longer text takes longer to read than it is worth."""
_DYNAMIC = ("import *", "__getattr__", "globals(", "locals(", "vars(", "setattr(", "exec(", "sys.modules")
"""A module with one of these may define more than its text says."""


def check_factory(path: str) -> None:
    """Raise FactoryError where a factory cannot be imported for sure; what cannot be told passes."""
    module_name, _, name = path.partition(":")
    spec = _find(module_name, path)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return
    file = Path(spec.origin)
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= _MAX_BYTES else ""
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):  # the import says it better
        return
    if not text or any(sign in text for sign in _DYNAMIC):
        return
    first = name.partition(".")[0]
    defined = set(_defined(tree.body))
    if first not in defined and not (file.name == "__init__.py" and _is_submodule(file.parent, first)):
        raise FactoryError(
            f"cannot import {path}: {module_name} has no {name!r}; check the spelling after the colon", factory=path
        )


def _find(module_name: str, path: str) -> ModuleSpec | None:
    """Where a module is, found without importing its packages; None where that cannot be told.

    Raises FactoryError where there is none.
    """
    parts = module_name.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return None
    for number in range(2, len(parts) + 1):
        if spec is None:
            break
        if spec.submodule_search_locations is None or (spec.origin and _adds_modules(Path(spec.origin))):
            return None
        # By its last name alone: under the whole one a folder without __init__.py looks for its parent in sys.modules.
        spec = PathFinder.find_spec(parts[number - 1], list(spec.submodule_search_locations))
        if spec is None:
            raise _missing(path, ".".join(parts[:number]))
    if spec is None:
        raise _missing(path, parts[0])
    return spec


def _missing(path: str, module_name: str) -> FactoryError:
    return FactoryError(
        f"cannot import {path}: no module {module_name!r}; check the spelling, or put its folder on PYTHONPATH",
        factory=path,
    )


def _adds_modules(package: Path) -> bool:
    """Whether a package may have modules that are no files of its folder."""
    try:
        text = package.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return "sys.modules" in text or "__path__" in text


def _is_submodule(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").exists() or (folder / name).is_dir()


def _defined(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """Names that statements of a module bind, those inside conditions and attempts included."""
    for statement in statements:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
            case _:
                yield from (
                    node.id
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                )
                for field in ("body", "orelse", "finalbody"):
                    yield from _defined(getattr(statement, field, []))
                for handler in getattr(statement, "handlers", []):
                    yield from _defined(handler.body)
