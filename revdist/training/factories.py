"""Building what a configuration names: `package.module:name`, imported when the run starts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from revdist.errors import FactoryError, RevdistError


def import_factory(path: str) -> Callable[..., Any]:
    """The callable at `package.module:name`; `name` may have dots.

    Raises FactoryError saying whether the module, the name or something inside the module is what
    is missing, and what to do about it.
    """
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FactoryError(f"cannot import {path}: {_missing_module(module_name, error)}", factory=path) from error
    except Exception as error:
        raise FactoryError(
            f"cannot import {path}: module {module_name} raised {type(error).__name__}: {error}; "
            f"run `python -c 'import {module_name}'` to see where",
            factory=path,
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise FactoryError(
                f"cannot import {path}: {module_name} has no {name!r}; check the spelling after the colon", factory=path
            )
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(
            f"{path} is a {type(found).__name__}, not a factory: name something that can be called", factory=path
        )
    return found  # type: ignore[no-any-return]


def call_factory(path: str, kwargs: Mapping[str, Any], *args: Any) -> Any:
    """Call the factory at `path` with the configured keyword arguments.

    Raises FactoryError when it cannot be imported or raises; errors of revdist pass as they are.
    """
    factory = import_factory(path)
    try:
        return factory(*args, **kwargs)
    except RevdistError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise FactoryError(
            f"{path}({given}) raised {type(error).__name__}: {error}; check its kwargs in the configuration",
            factory=path,
        ) from error


def _missing_module(module_name: str, error: ModuleNotFoundError) -> str:
    missing = error.name or module_name
    if missing == module_name or module_name.startswith(f"{missing}."):
        return f"no module {missing!r}; check the spelling, or put its folder on PYTHONPATH"
    return f"{module_name} needs {missing!r}, which is not installed: pip install {missing}"
