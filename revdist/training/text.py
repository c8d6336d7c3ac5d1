"""Text that every Python has: the standard library's help topics, as bytes.

    B windows in a batch   T bytes in a window

`pydoc_data.topics` is about 460 kB of English and code. Its exact text differs a little between
Python versions, so results on it are stated with the version.
"""

from __future__ import annotations

import importlib
import math
from typing import final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from revdist.errors import ConfigError, DataMissing

NUM_BYTES = 256
"""Size of the vocabulary of a byte-level model."""


@final
class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text for next-byte prediction: item i is (input_T, target_T), int64, target one byte ahead.

    text: NumPy bytes, so that on a CPU device only the windows in use are charged to the device
    length: bytes per window
    stride: bytes between the starts of two windows; smaller than `length`, windows overlap
    """

    def __init__(self, text: npt.NDArray[np.uint8], length: int, stride: int) -> None:
        self.text = text
        self.length = length
        self.stride = stride

    def __len__(self) -> int:
        return max(0, (len(self.text) - self.length - 1) // self.stride + 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        window = torch.from_numpy(self.text[start : start + self.length + 1].astype(np.int64))
        return window[:-1], window[1:]


def pydoc_text(
    length: int = 256, stride: int | None = None, test_fraction: float = 0.1
) -> tuple[ByteWindows, ByteWindows]:
    """Windows over the help topics of the Python that runs: (train, test).

    length: bytes per window
    stride: bytes between two training windows; none: `length`, every byte predicted once per epoch
    test_fraction: part of the text, taken from its end, that only test windows see

    Raises ConfigError for sizes that give no window, DataMissing for a Python without its topics.
    """
    stride = length if stride is None else stride
    if length < 1 or stride < 1 or not 0 < test_fraction < 1:
        raise ConfigError(
            f"pydoc_text needs a positive length and stride and a test_fraction between 0 and 1, "
            f"not length={length}, stride={stride}, test_fraction={test_fraction}"
        )
    text = _topics()
    cut = len(text) - int(len(text) * test_fraction)
    train = ByteWindows(text[:cut], length, stride)
    test = ByteWindows(text[cut:], length, length)
    if not len(train) or not len(test):
        raise ConfigError(f"pydoc_text: no window of {length} bytes fits into {len(text)}: lower length")
    return train, test


def _topics() -> npt.NDArray[np.uint8]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataMissing(
            "this Python has no pydoc_data.topics: some distributions move it to a package of its own "
            "(Debian: libpython3-stdlib); install it, or name other data"
        ) from None
    text = "\n".join(f"{name}\n{body}" for name, body in sorted(topics.items()))
    return np.frombuffer(text.encode(), dtype=np.uint8)


def bits_per_byte(output_BVT: Tensor, target_BT: Tensor, reduction: str = "sum") -> Tensor:
    """Cross-entropy of next-byte logits, averaged over a window: bits per byte, one number per sample.

    reduction: "sum" over samples (what training scales by the global batch), "mean" or "none"
    """
    nats_BT = F.cross_entropy(output_BVT.float(), target_BT, reduction="none")
    bits_B = nats_BT.mean(dim=1) / math.log(2)
    if reduction == "none":
        return bits_B
    return bits_B.sum() if reduction == "sum" else bits_B.mean()
