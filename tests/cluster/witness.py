"""A small model that writes down where it trains, when, and what its process listens on."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from small_models import Images, classifier
from torch import Tensor, nn


def watched_classifier(folder: str, *, slow_host: str = "", seconds_per_sample: float = 0.0) -> nn.Module:
    """The small classifier; notes go to `folder`. slow_host: where each sample takes longer by so many seconds."""
    return classifier(trouble=_Witness(Path(folder), slow_host, seconds_per_sample))


def images_at_a_pace(folder: str, seconds: float) -> tuple[Images, Images]:
    """The small images; each batch takes so long to load until `hurry` was called for the folder."""
    train = _PacedImages(50, 1)
    train.folder, train.seconds = Path(folder), seconds
    return train, Images(21, 2)


def hurry(folder: Path) -> None:
    """What had to happen during the run has happened."""
    (folder / "hurry").touch()


class _PacedImages(Images):
    folder: Path
    seconds: float

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        if not (self.folder / "hurry").exists():
            time.sleep(self.seconds)
        return [self[index] for index in indices]


class _Witness(nn.Module):
    def __init__(self, folder: Path, slow_host: str, seconds_per_sample: float) -> None:
        super().__init__()
        self.path = folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self.seconds_per_sample = seconds_per_sample if socket.gethostname() == slow_host else 0.0
        self.listening_before = listening()
        self.seen_sockets = False

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds_per_sample * len(x))
        if dist.is_initialized() and torch.is_grad_enabled():  # in a group, and not measuring the device
            self._note()
        return x

    def _note(self) -> None:
        note: dict[str, Any] = {"time": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        note |= {key: os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        if not self.seen_sockets:
            self.seen_sockets = True
            note |= {"before": self.listening_before, "listens": listening()}
            note["connects"] = [[*one.laddr, *one.raddr] for one in _sockets(psutil.CONN_ESTABLISHED)]
        with self.path.open("a") as out:
            out.write(json.dumps(note) + "\n")


def listening() -> list[list[Any]]:
    """Addresses and ports that this process listens on."""
    return [list(one.laddr) for one in _sockets(psutil.CONN_LISTEN)]


def _sockets(status: str) -> list[Any]:
    return [one for one in psutil.Process().net_connections("inet") if one.status == status]


def notes(folder: Path) -> Iterator[dict[str, Any]]:
    """All notes, process by process."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)
