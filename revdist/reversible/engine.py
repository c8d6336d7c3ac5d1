"""What autograd's engine leaves behind where a backward fails.

On the host the engine runs nodes from a queue of the calling thread, the youngest first. Where a node raises, the
others that wait stay in that queue, with their gradients and everything that they saved, until a later backward of
the thread comes to them: which it does not, since its own nodes are younger and it ends with them. Of a network with
two streams a whole step's activations may stay allocated so. (Threads of GPUs go on through their queues.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def nothing_left_pending() -> Iterator[None]:
    """Where a backward inside fails, what it had yet to run is freed."""
    try:
        yield
    except BaseException:
        let_pending_go()
        raise


def let_pending_go() -> None:
    """Free what a backward of this thread that failed had yet to run. Call after the failure."""
    result, leaf, gradient = _OLDEST
    torch.autograd.grad(result, leaf, gradient, retain_graph=True)


def _graph_of_a_new_thread() -> tuple[Tensor, Tensor, Tensor]:
    """A result, its leaf and its gradient: nodes are numbered by thread, so that no thread has older ones than this."""
    made: list[tuple[Tensor, Tensor, Tensor]] = []

    def make() -> None:
        with torch.enable_grad():
            leaf = torch.zeros((), device="cpu", requires_grad=True)
            made.append((leaf.clone(), leaf, torch.ones((), device="cpu")))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


_OLDEST = _graph_of_a_new_thread()
"""Made at import: when it is needed there may be no memory left."""
