"""The training under Ray Train v2: a TorchTrainer on a local cluster that restarts its workers from a checkpoint."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

from benchmarks.recovery.training import ENDLESS, Training


def train(config: dict[str, Any]) -> None:
    context = ray.train.get_context()
    training = Training(config["folder"], rank=context.get_world_rank())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            training.restore(torch.load(Path(folder) / "checkpoint.pt", weights_only=True))
    model = prepare_model(training.model)
    while training.step < ENDLESS:
        training.optimizer.zero_grad()
        training.loss(model, world_size=context.get_world_size()).backward()
        training.optimizer.step()
        training.done()
        if training.step % 10 == 0:  # all workers report together
            with tempfile.TemporaryDirectory() as folder:
                if training.is_to_be_saved:
                    training.save(Path(folder) / "checkpoint.pt")
                saved = ray.train.Checkpoint.from_directory(folder) if training.is_to_be_saved else None
                ray.train.report({"step": training.step}, checkpoint=saved)


def main(folder: str, num_workers: int) -> None:
    ray.init("local", num_cpus=num_workers + 2, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        train,
        train_loop_config={"folder": folder},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
        run_config=ray.train.RunConfig(
            storage_path=folder,
            name="run",
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
