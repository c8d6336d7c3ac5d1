from __future__ import annotations

from pathlib import Path

import pytest
from sample_profiles import profile

from revdist.errors import ConfigError, InvalidCosts, UsageError
from revdist.reporting.profile_files import read_profiles, write_profiles


def test_profiles_come_back_as_they_were_by_micro_batch(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    write_profiles(path, [profile(32), profile(8)])
    assert read_profiles(path) == (profile(8), profile(32))


def test_a_single_profile_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(profile().to_json())
    assert read_profiles(path) == (profile(),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "no profile"),
        ("7", "must be an object"),
        ('[{"options": []}]', "at least one operator"),
        ("[" + "[" * 100_000, "not JSON"),
    ],
)
def test_what_holds_no_profiles_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InvalidCosts, match=says) as caught:
        read_profiles(path)
    assert "bad.json" in str(caught.value)


def test_profiles_of_different_networks_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"
    write_profiles(path, [profile(8, operators=12), profile(32, operators=8)])
    with pytest.raises(InvalidCosts, match="one model"):
        read_profiles(path)


def test_files_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_profiles(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match="cannot write"):
        write_profiles(tmp_path / "no" / "folder.json", [profile()])
