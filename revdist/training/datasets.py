"""Real image data that packages ship, so that a first run needs no download.

Each factory returns `(train, test)`, two map-style datasets of `(image, label)` with the image a
float32 tensor (channels, height, width). Pixels are kept as NumPy bytes: on a CPU device only the
tensors of the batch in use are charged to the device.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from revdist.errors import ConfigError, DataMissing

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its four files."""

_IMAGES_MAGIC = 0x0803
_LABELS_MAGIC = 0x0801


@final
class ImageDataset(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Grey images held as bytes, given out as normalised float32 tensors (1, height, width)."""

    def __init__(self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], *, mean: float, std: float):
        assert len(pixels) == len(labels)
        self.pixels = pixels
        self.labels = labels
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images(self.pixels[index : index + 1])[0], int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several samples at once, the way torch's own fetcher asks for them."""
        images = self._images(self.pixels[np.asarray(indices)])
        return list(zip(images, self.labels[np.asarray(indices)].tolist(), strict=True))

    def _images(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy((pixels.astype(np.float32) - self.mean) / self.std).unsqueeze(1)


def digits(*, size: int = 8, test_fraction: float = 0.2) -> tuple[ImageDataset, ImageDataset]:
    """scikit-learn's 1797 handwritten digits, 10 classes, (1, size, size).

    `size` is a multiple of 8: each pixel is repeated, which gives a network with down-sampling room
    to work. The split into training and test data is fixed and keeps the classes balanced.

    Raises DataMissing without scikit-learn, ConfigError for another size or fraction.
    """
    if size < 8 or size % 8:
        raise ConfigError(f"digits are 8x8 images: size {size} must be a multiple of 8, such as 16")
    if not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction {test_fraction} must lie between 0 and 1")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataMissing(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    bunch = load_digits()
    repeat = size // 8
    pixels = (bunch.images * 15.9375).astype(np.uint8).repeat(repeat, axis=1).repeat(repeat, axis=2)
    labels = bunch.target.astype(np.int64)
    test = _balanced_choice(labels, test_fraction)
    parts = [ImageDataset(pixels[chosen], labels[chosen], mean=77.8, std=95.9) for chosen in (~test, test)]
    return parts[0], parts[1]


def fashion_mnist(*, directory: str | Path = FASHION_MNIST_DIR, padding: int = 2) -> tuple[ImageDataset, ImageDataset]:
    """Fashion-MNIST as Debian packages it: 60,000 and 10,000 images of clothes, 10 classes.

    `padding` black pixels are added on every side: 2 makes the 28x28 images 32x32, which halves
    cleanly three times.

    Raises DataMissing naming the file and the package when the data are not there.
    """
    directory = Path(directory)
    parts = []
    for part in ("train", "t10k"):
        pixels = _read_idx(directory / f"{part}-images-idx3-ubyte", _IMAGES_MAGIC)
        labels = _read_idx(directory / f"{part}-labels-idx1-ubyte", _LABELS_MAGIC).astype(np.int64)
        pixels = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))
        parts.append(ImageDataset(pixels, labels, mean=72.9, std=90.0))
    return parts[0], parts[1]


def _balanced_choice(labels: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.bool_]:
    """Mark `fraction` of every class, the same samples every time."""
    chosen = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[rng.choice(members, size=round(len(members) * fraction), replace=False)] = True
    return chosen


def _read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of bytes, plain or gzipped: magic, then one big-endian int32 per dimension, then the data."""
    try:
        if path.exists():
            content = path.read_bytes()
        else:
            content = gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    except FileNotFoundError:
        raise DataMissing(
            f"no Fashion-MNIST at {path}: apt-get install dataset-fashion-mnist, "
            "or name the folder that holds it with data.kwargs.directory"
        ) from None
    num_dimensions = magic & 0xFF
    header = np.frombuffer(content, dtype=">i4", count=1 + num_dimensions)
    if header[0] != magic:
        raise DataMissing(
            f"{path} is not the IDX file expected (magic {header[0]:#x}, not {magic:#x}): install it again"
        )
    shape = header[1:].astype(int)
    return np.frombuffer(content, dtype=np.uint8, offset=4 * len(header)).reshape(shape)
