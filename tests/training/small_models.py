"""Small reversible models for tests of training, and what goes wrong in them on purpose."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revdist.reversible.chain import ReversibleChain
from revdist.reversible.couplings import AdditiveCoupling
from revdist.training import checkpoint_folders, saving

CLASSES = 5
CHANNELS = 8


def branch(channels: int, *, norm: bool, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)] if norm else []
    layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def couplings(depth: int, *, norm: bool = False, dropout: float = 0.0) -> ReversibleChain:
    half = CHANNELS // 2
    return ReversibleChain(
        [AdditiveCoupling(*(branch(half, norm=norm, dropout=dropout) for _ in range(2))) for _ in range(depth)]
    )


def classifier(
    depth: int = 3, *, norm: bool = False, dropout: float = 0.0, wide: bool = False, trouble: nn.Module | None = None
) -> nn.Module:
    """Images (B, 1, H, W) to logits (B, CLASSES). wide: with more bytes of parameters than of activations."""
    head: nn.Module = nn.Linear(CHANNELS, CLASSES)
    if wide:
        head = nn.Sequential(nn.Linear(CHANNELS, 20_000), nn.Linear(20_000, CLASSES))
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1),
        trouble or nn.Identity(),
        couplings(depth, norm=norm, dropout=dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    )


def short_of_memory(*, rank: int, passes: list[int], phase: str, depth: int = 3) -> nn.Module:
    """The classifier, out of memory on one rank at the given training passes.

    phase: `forward`, `backward`, or `first backward`, before that of anything with parameters.
    """
    trouble = Shortage(rank, tuple(passes), phase)
    if phase == "first backward":
        return nn.Sequential(*classifier(depth).children(), trouble)
    return classifier(depth, trouble=trouble)


def on_a_slow_disk(seconds: float, depth: int = 3) -> nn.Module:
    """The classifier, in a process whose checkpoints take so long to publish, which is longer than saves wait."""
    publish = checkpoint_folders.LocalFolder.publish

    def publish_late(folder: checkpoint_folders.LocalFolder, place: str, name: str) -> None:
        time.sleep(seconds)
        publish(folder, place, name)

    checkpoint_folders.LocalFolder.publish = publish_late  # type: ignore[method-assign]
    saving._SLOW_WRITE_S = seconds / 100
    return classifier(depth)


class Shortage(nn.Module):
    """Passes its input on, and runs out of memory in chosen training passes of one rank."""

    def __init__(self, rank: int, passes: tuple[int, ...], phase: str) -> None:
        super().__init__()
        self.rank = rank
        self.passes = passes
        self.phase = phase
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        # The profiler's passes do not count: the group is formed after it.
        if not torch.distributed.is_initialized() or not torch.is_grad_enabled():
            return x
        self.count += 1
        fails = self.count in self.passes and int(os.environ["RANK"]) == self.rank
        if fails and self.phase == "forward":
            raise torch.OutOfMemoryError("a shortage staged in the forward")
        return _FailingBackward.apply(x, fails)


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fails: bool) -> Tensor:
        ctx.fails = fails
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.fails:
            raise torch.OutOfMemoryError("a shortage staged in the backward")
        return grad, None


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random images with random labels, the same every time."""

    def __init__(self, num_samples: int, seed: int, size: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(num_samples, 1, size, size, generator=generator)
        self.labels = torch.randint(CLASSES, (num_samples,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def images(num_samples: int = 50, num_test: int = 21, size: int = 6) -> tuple[Images, Images]:
    return Images(num_samples, 1, size), Images(num_test, 2, size)


class SlowImages(Images):
    """The same images, each batch of which takes a while to load: time for something to happen during the run."""

    seconds = 0.0

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        time.sleep(self.seconds)
        return [self[index] for index in indices]


def images_that_cannot_be_scored() -> tuple[Images, Images]:
    """The same images, with a label in the test data that is no class."""
    train, test = images()
    test.labels[-1] = CLASSES
    return train, test


def slow_images(seconds: float, num_samples: int = 50) -> tuple[SlowImages, None]:
    train = SlowImages(num_samples, 1)
    train.seconds = seconds
    return train, None


def images_on_a_device_that_goes(rank: int, after_s: float) -> tuple[Images, Images]:
    """Images; the device of one rank falls off the bus a while after training has begun there."""
    from revdist.devices.cpu import CpuDevice
    from revdist.errors import DeviceLost

    read = CpuDevice.read
    began_s: list[float] = []

    def reading(device: CpuDevice) -> Any:
        if os.environ.get("RANK") == str(rank):
            began_s.append(time.monotonic())
            if time.monotonic() - began_s[0] > after_s:
                raise DeviceLost(f"{device.name} fell off the bus (Xid 79); reset it or restart its host")
        return read(device)

    CpuDevice.read = reading  # type: ignore[method-assign]
    return images()


def classifier_that_loses_its_connections(rank: int, at: int) -> nn.Module:
    """The classifier; at a training pass, one rank's connections to its peers break, and nobody is to blame."""
    return classifier(trouble=Disconnection(rank, at))


class Disconnection(nn.Module):
    def __init__(self, rank: int, at: int) -> None:
        super().__init__()
        self.rank = rank
        self.at = at
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.distributed.is_initialized() and torch.is_grad_enabled():
            self.count += 1
            if self.count == self.at and int(os.environ["RANK"]) == self.rank:
                import gc

                from revdist.training.group import Group

                (group,) = [found for found in gc.get_objects() if isinstance(found, Group)]
                assert group._current is not None
                group._current.shut_down()
        return x


def classifier_that_misses_the_end_of_a_step(rank: int, step: int) -> nn.Module:
    """The classifier; on one rank, the connection breaks once all others have heard the end of a step."""
    from revdist.training.agreement import Agreement

    if os.environ.get("RANK") == str(rank):
        rows, ends = Agreement.rows, itertools.count(1)

        def rows_with_trouble(agreement: Agreement) -> Any:
            heard = rows(agreement)
            if next(ends) == step:
                raise RuntimeError("gloo/ connection closed, for a test")
            return heard

        Agreement.rows = rows_with_trouble  # type: ignore[method-assign]
    return classifier()


def classifier_with_trouble_at_a_join(trouble: str, folder: str) -> nn.Module:
    """The classifier; the newcomer dies when it first connects, or rank 0 fails when it does so in the background.

    trouble: `death` or `failure`, or `deaf`: no newcomer ever connects. folder: gets a file of that name, with a
    letter for each time that it has happened.
    """
    from revdist.training import connections

    connect, is_newcomer, mark = connections._connect, "RANK" not in os.environ, Path(folder) / trouble

    def connect_with_trouble(store: Any, rendezvous: Any, devices: Any) -> Any:
        in_background = threading.current_thread().name == "revdist-connect"
        here = rendezvous.rank == 0 and in_background if trouble == "failure" else is_newcomer
        if here and (trouble == "deaf" or not mark.exists()):
            with mark.open("a") as file:
                file.write("x")
            if trouble == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("gloo/ no connection, for a test")
        return connect(store, rendezvous, devices)

    connections._connect = connect_with_trouble
    return classifier()


def classifier_whose_maker_dies(rank: int, times: int, folder: str, by: str = "SIGKILL") -> nn.Module:
    """The process of one rank is killed, or stopped, while it makes the model, so many times; each leaves a file."""
    deaths = len(list(Path(folder).iterdir()))
    if int(os.environ["RANK"]) == rank and deaths < times:
        (Path(folder) / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.Signals[by])
    return classifier()


def classifier_built_together(folder: str, *, first: int, then: int) -> nn.Module:
    """The classifier. The processes that build it after the `first` ones wait until `then` of them do so as well."""
    place = Path(folder)
    (place / f"{os.getpid()}.built").touch()

    def num_built() -> int:
        return len(list(place.glob("*.built")))

    until_s = time.monotonic() + 60
    while first < num_built() < first + then:
        assert time.monotonic() < until_s, "the others are not built beside this one"
        time.sleep(0.05)
    return classifier()


def poisoned_images(samples: Sequence[int], **kwargs: int) -> tuple[Images, Images]:
    """The images, of which those training samples make the loss NaN."""
    train, test = images(**kwargs)
    train.images[list(samples)] = float("nan")
    return train, test
