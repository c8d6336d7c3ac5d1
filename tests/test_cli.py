"""The command line as a person or a script meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from revdist import cli
from revdist.cluster import trainer
from revdist.devices.reading import Holder, Reading
from revdist.errors import BudgetTooSmall, Preempted, RunFailed

sys.path.insert(0, str(Path(__file__).parent / "reporting"))
from sample_profiles import profile
from sample_run import write_run

from revdist.reporting.profile_files import read_profiles, write_profiles

CONFIG = """\
model: {factory: "revdist.models:revnet38", kwargs: {num_classes: 10}}
data: {factory: "revdist.training.datasets:digits"}
global_batch: 64
steps: 10
"""


FIGURES = ("learning.png", "memory.png")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="revdist")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


class FakeTrainer:
    """Stands in for the cluster: keeps what it was given and ends as it is told."""

    ending: BaseException | None = None
    given: dict[str, Any]

    def __init__(self, config: Any, **arguments: Any) -> None:
        type(self).given = {"config": config, **arguments}

    def fit(self) -> None:
        if self.ending is not None:
            raise self.ending


@pytest.fixture
def fake_trainer(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrainer]:
    class Fake(FakeTrainer):
        pass

    monkeypatch.setattr(trainer, "Trainer", Fake)
    return Fake


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from revdist import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'numpy', 'matplotlib', 'pydantic', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for command in ("launch", "plan", "devices", "report", "doctor", "status", "attach", "logs", "stop"):
        assert command in done.stdout


def test_the_version_is_the_package_s() -> None:
    from revdist import __version__

    assert run("--version").output == f"revdist {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "suggests"), [(["lunch"], "launch"), (["launch", "x.yaml", "--dryrun"], "--dry-run")]
)
def test_a_misspelt_word_is_answered_with_the_nearest_one(arguments: list[str], suggests: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert suggests in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["launch", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["launch", "small.yaml", "global_bach=3"], "did you mean 'global_batch'?"),
        (["launch", "small.yaml", "global_batch"], "must read key=value"),
        (["launch", "small.yaml", "--resume"], "--resume needs --run-dir"),
        (["launch", "small.yaml", "--nnodes", "4:2"], "MIN not above MAX"),
        (["launch", "small.yaml", "--local-ranks-filter", "0,x"], "must be numbers with commas"),
        (["launch", "small.yaml", "--local-ranks-filter", "0,\u00b2"], "must be numbers with commas"),
        (["launch", "small.yaml", "model.factory=revdist.models:revnet39", "--detach"], "has no 'revnet39'"),
        (["report", "nowhere"], "no run directory nowhere"),
        (["plan"], "give a CONFIG"),
        (["plan", "small.yaml", "--out", "plan.gif"], ".png or .html"),
        (["plan", "--device-profile", "nowhere.json"], "cannot read nowhere.json"),
        (["plan", "--device-profile", "small.yaml"], "is not JSON"),
    ],
)
def test_wrong_usage_is_told_in_five_lines_ends_with_2_and_writes_nothing(
    config: Path, arguments: list[str], says: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) <= 5
    assert says in result.stderr
    assert not result.stdout
    assert list(config.parent.iterdir()) == [config]


@pytest.mark.parametrize(
    ("ending", "code", "says"),
    [
        (None, 0, ""),
        (
            RunFailed("optimizer step failed", rank=1, host="node-b", remedy="lower lr"),
            1,
            "rank 1 on node-b: optimizer",
        ),
        (BudgetTooSmall(10, 20), 2, "10 B is below the smallest possible plan"),
        (Preempted("saved at step 7; go on with --resume"), 143, "saved at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("saved at step 7"), 130, "interrupted: saved at step 7"),
        (RuntimeError("boom"), 1, "this is a bug in revdist"),
    ],
)
def test_the_exit_code_says_how_a_run_ended(
    config: Path, fake_trainer: type[FakeTrainer], ending: BaseException | None, code: int, says: str
) -> None:
    fake_trainer.ending = ending
    result = run("launch", config)
    assert result.exit_code == code
    assert says in result.stderr


def test_the_traceback_is_shown_when_asked_for(
    config: Path, fake_trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REVDIST_TRACEBACK", "0")
    fake_trainer.ending = RuntimeError("boom")
    assert "Traceback" not in run("launch", config).stderr
    assert "Traceback" in run("--traceback", "launch", config).stderr


def test_launch_hands_on_what_it_was_given(config: Path, fake_trainer: type[FakeTrainer]) -> None:
    result = run("launch", config, "global_batch=32", "--address", "10.0.0.5:6379", "seed=3", "--run-dir", "here")
    assert result.exit_code == 0
    given = fake_trainer.given
    assert (given["config"].global_batch, given["config"].seed, given["config"].name) == (32, 3, "small")
    assert (given["address"], given["run_dir"], given["resume"]) == ("10.0.0.5:6379", Path("here"), False)


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        (["--nnodes", "2", "--nproc-per-node", "4"], (8, 8)),
        (["--nnodes=1:4", "--nproc_per_node=2"], (2, 8)),
        (["--nproc-per-node", "3"], (3, 3)),
        (["--nnodes", "1:2", "workers.max=7"], (1, 7)),
        ([], (1, None)),
    ],
)
def test_torchrun_spellings_set_the_number_of_replicas(
    config: Path, fake_trainer: type[FakeTrainer], arguments: list[str], workers: tuple[int, int | None]
) -> None:
    assert run("launch", config, *arguments).exit_code == 0
    chosen = fake_trainer.given["config"].workers
    assert (chosen.min, chosen.max) == workers


@pytest.mark.parametrize("dash", ["-", "_"])
def test_torchrun_spellings_of_restarts_and_logs(config: Path, fake_trainer: type[FakeTrainer], dash: str) -> None:
    flags = [f"--max{dash}restarts=7", f"--log{dash}dir=there", f"--local{dash}ranks{dash}filter=0,2"]
    assert run("launch", config, *flags).exit_code == 0
    assert fake_trainer.given["config"].workers.max_restarts == 7
    assert fake_trainer.given["log_dir"] == Path("there")


def test_factories_in_the_current_folder_are_found(config: Path, fake_trainer: type[FakeTrainer]) -> None:
    run("launch", config)
    assert os.getcwd() in sys.path


def test_plan_for_a_device_elsewhere_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_profiles(tmp_path / "card.json", [profile(8), profile(32)])
    code = "import sys; from revdist import cli; cli.main(); assert 'torch' not in sys.modules"
    arguments = [
        "plan",
        "--device-profile",
        "card.json",
        "--budget",
        "12MiB",
        "--out",
        "card.html",
        "--export",
        "c.json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}", *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert "At 12.0 MiB a micro-batch of 32 takes" in done.stdout
    assert "wrote card.html" in done.stdout
    assert "<svg" not in (tmp_path / "card.html").read_text()
    assert "data:image/svg+xml" in (tmp_path / "card.html").read_text()
    assert read_profiles(tmp_path / "c.json") == (profile(8), profile(32))


def test_a_plan_is_drawn_as_png(tmp_path: Path) -> None:
    write_profiles(tmp_path / "card.json", [profile()])
    result = run("plan", "--device-profile", tmp_path / "card.json", "--out", tmp_path / "card.png")
    assert result.exit_code == 0
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_a_plan_of_nothing_is_drawn_without_complaint(tmp_path: Path) -> None:
    (tmp_path / "nothing.json").write_text(
        '{"options": [[{"mode": "SAVE", "held_bytes": 0, "working_bytes": 0, "extra_s": 0}]]}'
    )
    result = run("plan", "--device-profile", tmp_path / "nothing.json", "--out", tmp_path / "nothing.png")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("size", ["-5", "nan", "9" * 400, "6 apples"])
def test_a_budget_that_is_no_size_is_refused(tmp_path: Path, size: str) -> None:
    write_profiles(tmp_path / "card.json", [profile()])
    result = run("plan", "--device-profile", tmp_path / "card.json", "--budget", size)
    assert result.exit_code == 2
    assert "is not a size" in result.stderr


def test_a_plan_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    write_profiles(tmp_path / "card.json", [profile()])
    result = run("plan", "--device-profile", tmp_path / "card.json", "--out", tmp_path / "no" / "card.png")
    assert result.exit_code == 2
    assert "choose another place with --out" in result.stderr


def test_report_says_where_it_wrote(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=20)
    written = run("report", run_dir, "--png", tmp_path / "figures").stdout.splitlines()
    assert written == [str(run_dir / "report.html"), *(str(tmp_path / "figures" / name) for name in FIGURES)]
    assert all(Path(path).stat().st_size > 1000 for path in written)


def test_devices_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVDIST_DEVICES_DIR", str(tmp_path))
    result = run("devices")
    assert result.exit_code == 0
    assert "cpu-0" in result.stdout


def test_a_holder_is_shown_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(pid=42, name="python [/data/x].py [a]", used_bytes=2**20)
    reading = Reading(
        uuid="CPU-1",
        name="cpu-0",
        kind="cpu",
        index=0,
        host="node-a",
        total_bytes=2**30,
        free_bytes=2**29,
        used_bytes=2**29,
        time_s=0.0,
        holders=(holder,),
    )
    monkeypatch.setattr("revdist.devices.list_devices", lambda: [reading])
    monkeypatch.setenv("COLUMNS", "120")
    result = run("devices")
    assert result.exit_code == 0
    assert "python [/data/x].py [a] (42) 1.0 MiB" in result.stdout
