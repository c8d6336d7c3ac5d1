"""What a machine lacks for Ray: its version, its parts, its token, its port. Ray itself is not imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import stat
from collections.abc import Callable
from pathlib import Path

from revdist.cluster.address import check_reachable
from revdist.cluster.admission import token_source
from revdist.devices.doctor import Finding
from revdist.errors import AddressUnreachable

PORT = 6379
"""Where `ray start` puts the head of a cluster."""
_PORT_S = 0.5
_PARTS = {"aiohttp": "jobs", "opentelemetry": "metrics", "grpc": "token checks"}
"""Modules that `ray[default]` brings and plain `ray` lacks, and what they are for."""


def examine_ray(port: int = PORT) -> list[Finding]:
    checks: tuple[Callable[[], Finding], ...] = (check_version, check_token, lambda: check_port(port))
    return [check() for check in checks]


def check_version() -> Finding:
    """The installed Ray, and whether it is one that revdist is made for."""
    name = "Ray"
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, status="fail", found="not installed", remedy="pip install 'ray[default]'")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 50):
        remedy = "pip install 'ray[default]>=2.50', the same version on every machine of a cluster"
        return Finding(name=name, status="fail", found=f"{version}, which is too old", remedy=remedy)
    missing = [purpose for module, purpose in _PARTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        found = f"{version}, without what it needs for {', '.join(missing)}"
        return Finding(name=name, status="warn", found=found, remedy=f"pip install 'ray[default]=={version}'")
    return Finding(name=name, status="ok", found=f"{version}; every machine of a cluster must have the same")


def check_token() -> Finding:
    """The token with which this user reaches Ray clusters; revdist's own make one for themselves."""
    name, source = "Ray token", token_source()
    wanted = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if not source:
        if wanted:
            remedy = "`ray get-auth-token --generate` makes one; copy ~/.ray/auth_token to every machine of a cluster"
            found = "none, and RAY_AUTH_MODE=token: Ray clusters cannot be reached"
            return Finding(name=name, status="warn", found=found, remedy=remedy)
        return Finding(name=name, status="ok", found="none: needed for clusters of several machines only")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        remedy = "unset RAY_AUTH_MODE, if the cluster asks for the token"
        found = f"one in {source}, which RAY_AUTH_MODE=disabled keeps from being sent"
        return Finding(name=name, status="warn", found=found, remedy=remedy)
    path = Path(source)
    if path.is_absolute():
        if not path.is_file():
            return Finding(name=name, status="fail", found=f"no file {path}", remedy="correct RAY_AUTH_TOKEN_PATH")
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            found = f"{path} can be read by others, who may then run code in your clusters"
            return Finding(name=name, status="warn", found=found, remedy=f"chmod 600 {path}")
    return Finding(name=name, status="ok", found=f"in {source}: a cluster at --address must have the same")


def check_port(port: int = PORT) -> Finding:
    """Who listens where `ray start` would."""
    name, address = "Ray's port", f"127.0.0.1:{port}"
    try:
        check_reachable(address, timeout_s=_PORT_S)
    except AddressUnreachable as error:
        if "is not a Ray cluster" not in error.message:
            return Finding(name=name, status="ok", found=f"{port} is free")
        found = f"{port} is taken by something that is not Ray"
        remedy = f"ray start --head --port={port + 1}, and --address HOST:{port + 1}"
        return Finding(name=name, status="warn", found=found, remedy=remedy)
    return Finding(name=name, status="ok", found=f"something that speaks gRPC, as Ray does, is at {port}")
