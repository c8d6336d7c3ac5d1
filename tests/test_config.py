"""Configurations: strict, typed, and helpful when wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from revdist.config import RunConfig, parse_bytes
from revdist.errors import ConfigError


def values(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"factory": "revdist.models:revnet38", "kwargs": {"num_classes": 10}},
        "data": {"factory": "revdist.training.datasets:digits"},
        "global_batch": 64,
        "steps": 10,
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("48MiB", 48 * 2**20), ("1.5 GiB", 3 * 2**29), ("200MB", 200_000_000), (17, 17), ("17", 17), ("0", 0)],
)
def test_sizes_are_read_as_people_write_them(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "12 parsecs", "-3MiB", "1e3", True])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


TENANT = {"device": "cpu-1", "take": "1MiB", "from_step": 5, "to_step": 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"globl_batch": 3}, "unknown key 'globl_batch': did you mean 'global_batch'?"),
        ({"memory": {"margn": 3}}, "unknown key 'memory.margn': did you mean 'margin'?"),
        (
            {"devices": [{"kind": "cpu", "capcity": "1MiB"}]},
            "unknown key 'devices.0.capcity': did you mean 'capacity'?",
        ),
        ({"global_batch": 0}, "global_batch: .*greater than or equal to 1.*got 0"),
        ({"global_batch": "many"}, "global_batch: .*got 'many'"),
        ({"epochs": 3}, "either epochs or steps: for example epochs=null steps=10, or steps=null$"),
        ({"steps": None}, "either epochs or steps"),
        ({"model": {"factory": "no colon"}}, "model.factory: .*got 'no colon'"),
        ({"devices": "everything"}, "devices"),
        (
            {"devices": [{"kind": "cpu"}, {"kind": "cuda"}, {"kind": "cpu"}]},
            "devices: 2 of kind cpu and 1 of kind cuda cannot form one group.*list devices of one kind",
        ),
        ({"workers": {"min": 4, "max": 2}}, "workers: min is 4 and max 2: lower min, or raise max"),
        (
            {"workers": {"min": 3}, "devices": [{"kind": "cpu"}] * 2},
            "workers.min is 3 and 2 devices are listed: lower workers.min, or list more devices$",
        ),
        (
            {"workers": {"min": 65}},
            "workers.min is 65 and global_batch 64, .*: lower workers.min, or raise global_batch$",
        ),
        ({"checkpoint": {"location": "~no-such-user/x"}}, "checkpoint.location: .*no such home.*got '~no-such-user/x'"),
        ({"precision": "fp12"}, "precision"),
        ({"name": "../escape"}, "name"),
        ({"devices": []}, "^configuration: devices: the list needs one device at least.*got "),
        ({"planning": {"modes": []}}, "planning.modes: .* at least 1 item"),
        ({"seed": 2**64}, "seed: .*less than 18446744073709551616"),
        ({"co_tenants": [{**TENANT, "to_step": 3}]}, "co_tenants.0.to_step: .*not below from_step, 5 .got 3"),
        ({"co_tenants": [TENANT], "devices": [{"kind": "cuda"}]}, "co_tenants.0.device: no replica runs on 'cpu-1'"),
        (
            {"co_tenants": [TENANT], "devices": [{"kind": "cpu", "name": "big"}]},
            "'cpu-1', only on big: change it",
        ),
    ],
)
def test_a_wrong_configuration_names_the_key_and_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.from_mapping(values(**changes))
    assert caught.value.exit_code == 2


def test_a_second_length_is_explained_in_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, steps=None, epochs=12)
    with pytest.raises(ConfigError, match=r"for example epochs=null steps=5, or steps=null$"):
        RunConfig.from_yaml(path, ["steps=5"])
    with pytest.raises(ConfigError, match=r"for example epochs=12 or steps=1000$"):
        RunConfig.from_yaml(path, ["epochs=null"])
    assert RunConfig.from_yaml(path, ["epochs=null", "steps=5"]).steps == 5


def test_a_co_tenant_may_be_on_a_device_that_gets_its_name_later() -> None:
    devices = [{"kind": "cpu", "name": "cpu-0"}, {"kind": "cpu"}]
    assert RunConfig.from_mapping(values(devices=devices, co_tenants=[TENANT])).co_tenants[0].device == "cpu-1"


def test_a_missing_key_is_named() -> None:
    incomplete = values()
    del incomplete["model"]
    with pytest.raises(ConfigError, match="key 'model' is missing"):
        RunConfig.from_mapping(incomplete)


def test_a_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    devices = [{"kind": "cpu", "capacity": "48MiB"}, {"kind": "cpu", "name": "big", "capacity": "1GiB"}]
    config = RunConfig.from_mapping(values(devices=devices, name="two-cpus"))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.from_yaml(path) == config


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(**changes)))
    return path


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, devices=[{"kind": "cpu", "capacity": "48MiB"}])
    config = RunConfig.from_yaml(
        path, ["global_batch=8", "memory.margin=2MiB", "devices.0.capacity=64MiB", "optimizer.kwargs.lr=0.5"]
    )
    assert config.name == "tiny"
    assert config.global_batch == 8
    assert config.memory.margin == 2 * 2**20
    assert config.devices[0].capacity == 64 * 2**20  # type: ignore[union-attr]
    assert config.optimizer.kwargs["lr"] == 0.5
    assert config.optimizer.kwargs["momentum"] == 0.9


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("~/ckpt", "{home}/ckpt"),
        ("ckpt", "{here}/ckpt"),
        ("/ckpt", "/ckpt"),
        ("s3://bucket/~/ckpt", "s3://bucket/~/ckpt"),
        ("", ""),
    ],
)
def test_a_folder_of_checkpoints_is_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, path: str
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(here)
    config = RunConfig.from_mapping(values(checkpoint={"location": location}, name="tiny"))
    assert config.checkpoint.location == path.format(home=tmp_path / "home", here=here)
    (here / "config.yaml").write_text(config.to_yaml())
    monkeypatch.chdir(elsewhere)
    assert RunConfig.from_yaml(here / "config.yaml") == config


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+.1e-2", "1.0e-3", "10e-4", "0.001"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    path = write(tmp_path)
    overridden = RunConfig.from_yaml(path, [f"optimizer.kwargs.lr={text}"])
    assert overridden.optimizer.kwargs["lr"] == 0.001
    path.write_text(path.read_text() + f"optimizer:\n  kwargs: {{lr: {text}}}\n")
    assert RunConfig.from_yaml(path) == overridden


@pytest.mark.parametrize("text", ["1e", "e3", "1e-", "e-3", "1e3MiB", "-e3", ".e3", "'1e-3'", '"2E5"', "1e-3.5"])
def test_what_only_looks_like_a_number_stays_a_string(tmp_path: Path, text: str) -> None:
    config = RunConfig.from_yaml(write(tmp_path), [f"model.kwargs.x={text}"])
    assert config.model.kwargs["x"] == text.strip("'\"")


@pytest.mark.parametrize(
    "value",
    ["1e-3", "1E5", "-.5", "+1.e3", "1e", "e3", "089", "0x1f", "12", "1:30", "null", 1e-3, 1e22, -1e-300, 12, 0.1],
)
def test_strings_and_numbers_survive_being_written(tmp_path: Path, value: Any) -> None:
    config = RunConfig.from_mapping(values(model={"factory": "a:b", "kwargs": {"x": value}}, name="tiny"))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    read = RunConfig.from_yaml(path)
    assert read == config
    assert type(read.model.kwargs["x"]) is type(value)


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        ({}, {"lr": 0.1, "momentum": 0.9}),
        ({"kwargs": {"lr": 0.05}}, {"lr": 0.05, "momentum": 0.9}),
        ({"kwargs": {"momentum": 0, "nesterov": False}}, {"lr": 0.1, "momentum": 0, "nesterov": False}),
        ({"factory": "torch.optim:SGD", "kwargs": {"lr": 0.05}}, {"lr": 0.05, "momentum": 0.9}),
        ({"factory": "torch.optim:AdamW"}, {}),
        ({"factory": "torch.optim:RMSprop", "kwargs": {"alpha": 0.9}}, {"alpha": 0.9}),
    ],
)
def test_kwargs_of_the_default_optimizer_are_filled_in_key_by_key(
    tmp_path: Path, optimizer: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    config = RunConfig.from_mapping(values(optimizer=optimizer, name="tiny"))
    assert config.optimizer.kwargs == kwargs
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.from_yaml(path) == config


def test_a_file_name_that_cannot_name_a_run_is_said_to_be_one(tmp_path: Path) -> None:
    path = write(tmp_path).rename(tmp_path / "my run.yaml")
    with pytest.raises(ConfigError, match=r"its own, 'my run', cannot be one: .*say name=run"):
        RunConfig.from_yaml(path)
    assert RunConfig.from_yaml(path, ["name=mine"]).name == "mine"
    assert RunConfig.from_yaml(write(tmp_path, name="mine").rename(path)).name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch", "must read key=value"),
        ("global_bach=3", "did you mean 'global_batch'"),
        ("global_batch.x=3", "global_batch is a value, not a section"),
        ("devices.4.capacity=1MiB", "entries 0 to 0, not 4"),
        ("devices.\u00b2.capacity=1MiB", "entries 0 to 0, not \u00b2"),
        ("steps=[", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_explained(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, devices=[{"kind": "cpu", "capacity": "48MiB"}])
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_yaml(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold keys and values"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        RunConfig.from_yaml(tmp_path / "none.yaml")
