"""A Ray Dataset trains a run, each of its rows once per epoch, on a real local Ray."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Watcher, settings

import revdist
from revdist.cluster.local import ray_cluster
from revdist.cluster.ray_data import as_map_style
from revdist.errors import ConfigError, DataMissing
from revdist.training.checkpoint import read_state
from revdist.training.checkpoint_files import newest
from revdist.training.data import fetch

pytestmark = pytest.mark.usefixtures("devices_folder")


@pytest.fixture(scope="module", autouse=True)
def running_ray() -> Iterator[None]:
    with ray_cluster(None, num_workers=2):
        yield


def rows(num: int = 50) -> list[dict[str, Any]]:
    """The images of small_models, as rows."""
    from small_models import images

    train, _ = images(num)
    return [{"image": image.numpy(), "label": label, "name": f"number {n}"} for n, (image, label) in enumerate(train)]


def dataset(num: int = 50, blocks: int = 7) -> Any:
    import ray.data

    return ray.data.from_items(rows(num), override_num_blocks=blocks)


def test_rows_are_found_by_number_across_blocks() -> None:
    train = as_map_style(dataset(), input="image", target="label")
    assert len(train) == 50
    assert [int(label) for _, label in (train[n] for n in range(50))] == [row["label"] for row in rows()]
    chosen = np.array([49, 0, 7, 8, 8, 30])
    inputs, target = fetch(train, chosen)
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, torch.stack([torch.from_numpy(rows()[n]["image"]) for n in chosen]))
    assert target.tolist() == [rows()[n]["label"] for n in chosen]
    with pytest.raises(IndexError, match="rows 50 to 50 of 50"):
        train[50]
    assert len(pickle.dumps(train, protocol=5)) < 20_000


def test_a_pipeline_keeps_its_order() -> None:
    def doubled(batch: dict[str, Any]) -> dict[str, Any]:
        return {"image": batch["image"] * 2, "label": batch["label"]}

    train = as_map_style(dataset().map_batches(doubled, batch_size=4), input="image", target="label")
    inputs, _ = fetch(train, np.arange(50))
    assert torch.equal(inputs, torch.stack([torch.from_numpy(row["image"]) for row in rows()]) * 2)


def test_what_cannot_be_an_input_is_named() -> None:
    with pytest.raises(ConfigError, match="has no column 'picture': it has image, label, name"):
        as_map_style(dataset(), input="picture", target="label")
    with pytest.raises(ConfigError, match="'name' and 'label' must hold numbers"):
        as_map_style(dataset(), input="name", target="label")


def test_a_dataset_that_cannot_be_read_is_missing_data() -> None:
    def fail(batch: dict[str, Any]) -> dict[str, Any]:
        raise OSError("no such bucket")

    with pytest.raises(DataMissing, match=r"cannot be read: OSError: no such bucket"):
        as_map_style(dataset().map_batches(fail), input="image", target="label")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_ray_dataset_trains_as_the_same_data_do_otherwise(tmp_path: Path) -> None:
    run = {"steps": 3, "epochs": None, "evaluate": False, "precision": "fp64"}
    revdist.Trainer(settings(**run), run_dir=tmp_path / "plain").fit()
    given = settings(**run)
    del given["data"]
    watcher = Watcher()
    train = as_map_style(dataset(), input="image", target="label")
    revdist.Trainer(given, datasets=(train, None), run_dir=tmp_path / "ray", observer=watcher).fit()
    assert [step["samples"] for step in watcher.steps] == [10, 20, 30]
    plain, ray_data = (read_state(newest(tmp_path / name / "checkpoints")) for name in ("plain", "ray"))
    assert plain.keys() == ray_data.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(ray_data[name], tensor, rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigError, match="give them again"):
        revdist.Trainer(
            run_dir=tmp_path / "again", **{**given, "data": {"factory": "revdist.training.data:given_to_trainer"}}
        ).fit()


def test_a_ray_dataset_as_it_is_says_how_to_wrap_it(tmp_path: Path) -> None:
    trainer = revdist.Trainer(settings(), datasets=(dataset(), None), run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"revdist.cluster.ray_data.as_map_style\(dataset"):
        trainer.fit()
