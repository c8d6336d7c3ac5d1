"""Compiles the package's native sources on first use.

A library is kept in the user's cache folder under the hash of its sources, of torch's version and
of the compile command, so an upgrade of either compiles afresh. Any number of processes may ask at
once: one compiles, the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from revdist.errors import DeviceError

NATIVE = Path(__file__).with_name("native")
_FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
_COMPILE_TIMEOUT_S = 120.0


class CompilerMissing(DeviceError):
    """There is no C++ compiler, or it fails on our sources."""


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, else the first of c++, g++ and clang++ on PATH."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def torch_folder() -> Path:
    """Where torch is installed, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise DeviceError("torch is not installed: pip install torch")
    return Path(spec.origin).parent


def cache_folder() -> Path:
    """`$REVDIST_CACHE_DIR`, else revdist in the user's cache folder, else one of this user's in the temporary folder.

    Raises DeviceError where it belongs to somebody else: what lies in it is loaded as code.
    """
    if configured := os.environ.get("REVDIST_CACHE_DIR"):
        candidates = [Path(configured)]
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "revdist"
        candidates = [home, Path(tempfile.gettempdir()) / f"revdist-cache-{os.getuid()}"]
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    raise DeviceError(f"cannot write to {candidates[-1]}: set REVDIST_CACHE_DIR to a folder of yours")


def build(source: str, *, libraries: Sequence[str] = ("c10",)) -> Path:
    """The shared library of `native/<source>`, linked with torch's `libraries`.

    Raises CompilerMissing where it cannot be compiled.
    """
    compiler = find_compiler()
    command = [
        compiler or "c++",
        *_FLAGS,
        f"-isystem{torch_folder() / 'include'}",
        str(NATIVE / source),
        f"-L{torch_folder() / 'lib'}",
        *(f"-l{library}" for library in libraries),
    ]
    target = cache_folder() / f"{Path(source).stem}-{_fingerprint(source, command)}.so"
    if target.exists():
        return target
    if compiler is None:
        raise CompilerMissing("no C++ compiler: install g++ or set CXX")
    with _exclusive(target.with_suffix(".lock")):
        if not target.exists():
            _compile(command, target)
    return target


def _fingerprint(source: str, command: Sequence[str]) -> str:
    # The compiler itself is left out: a library compiled once is used where there is none any more.
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for path in (NATIVE / source, *sorted(NATIVE.glob("*.h"))):
        digest.update(path.read_bytes())
    for word in command[1:]:
        digest.update(word.encode())
    return digest.hexdigest()[:20]


def _compile(command: Sequence[str], target: Path) -> None:
    draft = target.with_suffix(f".{os.getpid()}.draft")
    try:
        subprocess.run(
            [*command, "-o", str(draft)], check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
        )
        draft.replace(target)  # nobody ever loads half a library
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[-200:])
        raise CompilerMissing(f"{command[0]} fails on {target.stem}: {first}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerMissing(f"{command[0]} fails on {target.stem}: {error}") from None
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds a lock that dies with this process. Gives up waiting for a frozen one: then both compile, which is safe."""
    deadline_s = time.monotonic() + _COMPILE_TIMEOUT_S
    with path.open("a") as file:
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        yield
