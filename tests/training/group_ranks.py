"""Ranks as processes of this machine, each with a group to join and whatever a test has them do."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch

from revdist.training.group import Group
from revdist.training.network import listen
from revdist.training.orders import Rendezvous

PATIENCE_S = 60.0


def rendezvous(rank: int, world_size: int, port: int, *, prefix: str = "first") -> Rendezvous:
    return Rendezvous(
        host="127.0.0.1", port=port, prefix=prefix, rank=rank, world_size=world_size, timeout_s=PATIENCE_S
    )


def on_ranks(world_size: int, work: Callable[..., Any], *, answering: int | None = None) -> list[Any]:
    """Run `work(rank, group, ports)` in one process per rank; returns what each made, None for one that is dead.

    answering: the first so many ranks are waited for, the others killed once these have answered; None: all.
    """
    context = multiprocessing.get_context("fork")
    listeners = [listen("127.0.0.1") for _ in range(world_size)]
    ports = [listener.getsockname()[1] for listener in listeners]
    pipes, processes = [], []
    for rank, listener in enumerate(listeners):
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(work, rank, listener, ports, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_receive(pipe) for pipe in pipes[:answering]]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for listener in listeners:
            listener.close()


def _receive(pipe: Any) -> Any:
    assert pipe.poll(PATIENCE_S), "a rank did not answer in time"
    try:
        return pipe.recv()
    except EOFError:
        return None


def _run(work: Callable[..., Any], rank: int, listener: socket.socket, ports: list[int], pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(work(rank, Group("cpu", listener), ports))
