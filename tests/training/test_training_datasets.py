"""Data that packages ship."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from revdist.errors import ConfigError, DataMissing
from revdist.training.datasets import FASHION_MNIST_DIR, digits, fashion_mnist


def test_digits_are_split_once_and_for_all_with_balanced_classes() -> None:
    train, test = digits()
    assert (len(train), len(test)) == (1438, 359)
    assert np.bincount(test.labels).tolist() == pytest.approx([36] * 10, abs=2)
    again, _ = digits()
    assert np.array_equal(train.pixels, again.pixels)


def test_digits_are_normalised_float_images() -> None:
    train, _ = digits(size=16)
    images = torch.stack([image for image, _ in train.__getitems__(range(len(train)))])
    assert images.shape == (1438, 1, 16, 16)
    assert images.dtype == torch.float32
    assert float(images.mean()) == pytest.approx(0, abs=0.01)
    assert float(images.std()) == pytest.approx(1, abs=0.01)
    one, label = train[3]
    assert torch.equal(one, images[3])
    assert isinstance(label, int)


@pytest.mark.parametrize("kwargs", [{"size": 12}, {"size": 0}, {"test_fraction": 1.0}])
def test_digits_of_another_kind_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        digits(**kwargs)  # type: ignore[arg-type]


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataMissing, match="pip install scikit-learn"):
        digits()


def write_idx(path: Path, values: np.ndarray, *, compress: bool) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}i", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_fashion_mnist(folder: Path, *, compress: bool) -> None:
    for part, count in (("train", 6), ("t10k", 3)):
        write_idx(folder / f"{part}-images-idx3-ubyte", np.full((count, 28, 28), 9), compress=compress)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count), compress=compress)


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_is_read_from_idx_files(compress: bool, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, compress=compress)
    train, test = fashion_mnist(directory=tmp_path)
    assert (len(train), len(test)) == (6, 3)
    image, label = train[4]
    assert image.shape == (1, 32, 32)
    assert label == 4
    assert image[0, 0, 0] < image[0, 2, 2], "two black pixels of padding"


def test_missing_fashion_mnist_names_the_file_and_the_package(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="apt-get install dataset-fashion-mnist") as caught:
        fashion_mnist(directory=tmp_path)
    assert "train-images-idx3-ubyte" in str(caught.value)


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, compress=False)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 2)), compress=False)
    with pytest.raises(DataMissing, match="not the IDX file expected"):
        fashion_mnist(directory=tmp_path)


@pytest.mark.skipif(not FASHION_MNIST_DIR.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian() -> None:
    train, test = fashion_mnist()
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
