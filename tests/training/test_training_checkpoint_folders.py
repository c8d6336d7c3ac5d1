"""A checkpoint is whole or it is none, in a local folder and behind a URL alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch

from revdist.errors import CheckpointError, ConfigError
from revdist.training import checkpoint
from revdist.training.checkpoint_files import Checkpoint, Progress, checkpoints, newest_whole, prune
from revdist.training.checkpoint_folders import Folder, LocalFolder, UrlFolder, open_folder


def progress(step: int) -> Progress:
    return Progress(step=step, seed=7, global_batch=4, num_samples=9, generation=2, shares=(1, 3))


def state(step: int) -> dict[str, torch.Tensor]:
    return {"model/x": torch.full((3000,), float(step)), "model/empty": torch.ones(0), "model/n": torch.tensor(step)}


def save(folder: Folder, step: int) -> Checkpoint:
    return checkpoint.save(folder, state(step), progress(step), {"note.json": json.dumps(step)})


@pytest.fixture(params=["path", "file", "memory", "local"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """The same folder as a path, as file://, and through fsspec in memory and on the disk."""
    place = {
        "path": str(tmp_path / "saved"),
        "file": f"file://{tmp_path}/saved",
        "memory": f"memory://{tmp_path}/saved",
        "local": f"local://{tmp_path}/saved",
    }[request.param]
    opened = open_folder(place)
    assert isinstance(opened, UrlFolder if request.param in ("memory", "local") else LocalFolder)
    return opened


def change(found: Checkpoint, file: str, edit: Callable[[bytes], bytes | None]) -> None:
    """Damage a file of a checkpoint behind its back; None removes it."""
    url = f"{found}/{file}" if "://" in str(found) else f"file://{found}/{file}"
    fs, path = fsspec.url_to_fs(url)
    content = edit(fs.cat_file(path))
    fs.rm_file(path)
    if content is not None:
        fs.pipe_file(path, content)


def files_of(found: Checkpoint) -> list[str]:
    url = str(found) if "://" in str(found) else f"file://{found}"
    fs, path = fsspec.url_to_fs(url)
    return sorted(name.rpartition("/")[2] for name in fs.ls(path, detail=False))


def test_what_is_saved_is_found_whole_and_read_back(folder: Folder) -> None:
    assert checkpoints(folder) == []
    for step in (1, 2):
        save(folder, step)
    found = newest_whole(folder)
    assert (found.checkpoint.name, found.torn) == ("step-000000002", {})
    assert found.contents.progress == progress(2)
    assert found.contents.versions["torch"] == torch.__version__
    assert files_of(found.checkpoint) == sorted([*found.contents.files, "progress.json"])
    back = checkpoint.read_state(found.checkpoint)
    assert back.keys() == state(2).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state(2).items())


def test_a_step_saved_again_replaces_the_first(folder: Folder) -> None:
    save(folder, 1)
    saved = checkpoint.save(folder, {"model/y": torch.ones(1)}, progress(1))
    assert checkpoint.read_state(saved) == {"model/y": torch.ones(1)}
    assert saved.verify().files.keys() == {".metadata", "__0_0.distcp"}
    assert folder.names() == ["step-000000001"]


def truncated(content: bytes) -> bytes:
    return content[:-100]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def missing(_: bytes) -> None:
    return None


DAMAGES = [
    ("__0_0.distcp", truncated, r"__0_0.distcp has \d+ bytes, not \d+"),
    ("__0_0.distcp", flipped, "__0_0.distcp does not have its checksum"),
    (".metadata", missing, ".metadata is missing"),
    ("note.json", flipped, "note.json does not have its checksum"),
    ("progress.json", truncated, "progress.json is not what a checkpoint ends with"),
    ("progress.json", lambda content: content.replace(b'"step": 3', b'"step": 8'), "does not have its checksum"),
    ("progress.json", lambda _: b"\xff\xfe", "progress.json is not what a checkpoint ends with"),
    ("progress.json", lambda _: b"[1]", "progress.json is not what a checkpoint ends with"),
    ("progress.json", lambda content: content.replace(b'"format": 1', b'"format": 99'), "its format is 99"),
]


@pytest.mark.parametrize(("file", "damage", "fault"), DAMAGES)
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    file: str, damage: Callable[[bytes], bytes | None], fault: str, folder: Folder
) -> None:
    for step in (1, 2, 3):
        save(folder, step)
    change(checkpoints(folder)[-1], file, damage)
    found = newest_whole(folder)
    assert found.checkpoint.name == "step-000000002"
    assert list(found.torn) == ["step-000000003"]
    with pytest.raises(CheckpointError, match=fault):
        Checkpoint(folder, "step-000000003").verify()


def test_a_checkpoint_without_its_last_file_was_never_finished(folder: Folder) -> None:
    save(folder, 1)
    change(save(folder, 2), "progress.json", missing)
    assert [found.name for found in checkpoints(folder)] == ["step-000000001"]


def test_where_none_is_whole_each_fault_is_told(folder: Folder) -> None:
    for step in (1, 2):
        save(folder, step)
    change(checkpoints(folder)[0], ".metadata", missing)
    change(checkpoints(folder)[1], "__0_0.distcp", truncated)
    with pytest.raises(CheckpointError, match=r"is whole \(step-000000002: __0_0.distcp has .*; step-000000001: .meta"):
        newest_whole(folder)


def test_the_policy_keeps_the_newest_and_the_multiples(folder: Folder) -> None:
    for step in range(1, 10):
        save(folder, step)
        prune(folder, step=step, keep=2, keep_every_steps=4)
    assert [found.step for found in checkpoints(folder)] == [4, 8, 9]


def test_a_torn_one_takes_no_good_ones_place(folder: Folder) -> None:
    for step in (1, 2, 9):
        save(folder, step)
    change(checkpoints(folder)[-1], ".metadata", missing)
    save(folder, 3)  # the run has gone on from step 2
    prune(folder, step=3, keep=2, keep_every_steps=None)
    assert [found.step for found in checkpoints(folder)] == [2, 3, 9]
    assert newest_whole(folder).checkpoint.step == 3


def test_those_known_to_be_torn_do_not_count_and_stay(folder: Folder) -> None:
    for step in (1, 2, 3, 4):
        save(folder, step)
    prune(folder, step=4, keep=2, keep_every_steps=None, torn=["step-000000003"])
    assert [found.step for found in checkpoints(folder)] == [2, 3, 4]


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes_away(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    save(folder, 1)
    part = folder.start("step-000000002")
    (tmp_path / part / "progress.json").write_text("half")
    assert newest_whole(folder).checkpoint.step == 1
    save(folder, 2)
    assert folder.names() == ["step-000000001", "step-000000002"]


def test_a_killed_writers_files_behind_a_url_are_written_over(tmp_path: Path) -> None:
    folder = UrlFolder(f"memory://{tmp_path}")
    with folder.writing(f"{folder.start('step-000000001')}/left") as file:
        file.write(b"over")
    assert checkpoints(folder) == []
    assert "left" not in files_of(save(folder, 1))


def test_one_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    save(folder, 1)
    (tmp_path / "step-000000002").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*free space there"):
        save(folder, 2)
    assert folder.names() == ["step-000000001", "step-000000002"]
    assert newest_whole(folder).checkpoint.step == 1


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    other = save(LocalFolder(tmp_path / "other"), 1)
    saved = save(folder, 1)
    change(saved, ".metadata", lambda content: content.replace(b"__0_0.distcp", b"../o/th/file"))
    with pytest.raises(CheckpointError, match="outside of its checkpoint"):
        checkpoint.read_state(saved)
    assert other.verify()


@pytest.mark.parametrize(("url", "why"), [("nosuch://x/y", "not a URL that fsspec opens"), ("s3://bucket/x", "s3fs")])
def test_a_url_that_nothing_opens_says_so(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        open_folder(url)
