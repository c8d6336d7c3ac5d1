"""What a configuration names is built, or it is said why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from revdist.errors import ConfigError, DataMissing, FactoryError
from revdist.training.factories import call_factory, import_factory


def test_a_factory_may_be_nested() -> None:
    assert import_factory("torch:nn.Linear") is torch.nn.Linear
    assert call_factory("torch.nn:Linear", {"in_features": 2, "out_features": 3}).out_features == 3


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package:f", "no module 'no_such_package'; check the spelling"),
        ("torch.no_such_part:f", "no module 'torch.no_such_part'"),
        ("torch.nn:NoSuchLayer", "has no 'NoSuchLayer'; check the spelling after the colon"),
        ("torch:__version__", "not a factory"),
    ],
)
def test_what_cannot_be_imported_says_what_is_wrong(path: str, said: str) -> None:
    with pytest.raises(FactoryError, match=said):
        import_factory(path)


def test_a_module_that_needs_another_names_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_model.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FactoryError, match="needs 'no_such_library', which is not installed: pip install"):
        import_factory("needy_model:f")


def test_a_module_that_fails_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_model.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FactoryError, match="ZeroDivisionError"):
        import_factory("broken_model:f")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(FactoryError, match=r"torch.nn:Linear\(in_features=2\) raised TypeError.*check its kwargs"):
        call_factory("torch.nn:Linear", {"in_features": 2})


def test_errors_of_revdist_pass_as_they_are() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        call_factory("revdist.training.datasets:digits", {"size": 9})
    with pytest.raises(DataMissing):
        call_factory("revdist.training.datasets:fashion_mnist", {"directory": "/no/such/folder"})
