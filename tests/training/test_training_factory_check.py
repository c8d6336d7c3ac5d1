"""Mistakes in the name of a factory are seen without importing it, and nothing else is taken for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from revdist.errors import FactoryError
from revdist.training.factories import import_factory
from revdist.training.factory_check import check_factory

ROOT = Path(__file__).parent.parent.parent
FINE = [
    "torch.optim:SGD",
    "torch.nn:Linear",
    "torch:nn.Linear",
    "torch.nn.functional:cross_entropy",
    "torch:relu",
    "math:sqrt",
    "builtins:len",
    "os:path.join",
    "os.path:join",
    "sklearn.datasets:load_digits",
    "numpy:add",
    "revdist.models:revnet_digits",
    "revdist:Trainer",
]


@pytest.mark.parametrize("path", FINE)
def test_what_can_be_imported_passes(path: str) -> None:
    check_factory(path)
    import_factory(path)


def test_folders_without_an_init_are_packages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "research" / "models" / "deep"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text("def model(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_factory("research.models.deep.mine:model")
    with pytest.raises(FactoryError, match="has no 'modle'"):
        check_factory("research.models.deep.mine:modle")
    with pytest.raises(FactoryError, match=r"no module 'research\.models\.deep\.yours'"):
        check_factory("research.models.deep.yours:model")


def test_every_configuration_passes() -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        for called in (values["model"]["factory"], values["data"]["factory"], values.get("loss", "math:sqrt")):
            check_factory(called)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package:f", "no module 'no_such_package'; check the spelling"),
        ("no_such_package.part:f", "no module 'no_such_package'"),
        ("revdist.no_such_part:f", "no module 'revdist.no_such_part'"),
        ("revdist.models:revnet_digit", "has no 'revnet_digit'; check the spelling after the colon"),
        ("mine:modle", "has no 'modle'"),
        ("mine.deeper:model", "no module 'mine.deeper'"),
    ],
)
def test_what_cannot_is_refused_as_the_import_would(
    path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("def model(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for check in (check_factory, import_factory):
        with pytest.raises(FactoryError, match=said):
            check(path)


@pytest.mark.parametrize(
    "text",
    [
        "from torch.nn import *\n",
        "def __getattr__(name): return print\n",
        "globals()['model'] = print\n",
        "for model in (print,): pass\n",
        "try:\n    import nothing\nexcept ImportError:\n    from builtins import print as model\n",
        "if True:\n    class model: ...\n",
        "(a, model), *b = (1, print), 2\n",
        "with open('/dev/null') as model: pass\n",
        "model: object = print\n",
        "if (model := print): pass\n",
        "syntax error, which the import tells\n",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_what_the_text_cannot_tell_passes(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_model.py").write_text(text, encoding="latin-1")
    monkeypatch.syspath_prepend(tmp_path)
    check_factory("odd_model:model")


def test_nothing_is_imported_for_it(tmp_path: Path) -> None:
    code = (
        "import sys; from revdist.training.factory_check import check_factory\n"
        f"for path in {FINE!r}: check_factory(path)\n"
        "assert not {'torch', 'numpy', 'sklearn', 'revdist.models'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
