"""When and by whom training state is saved and taken up again: what a replica knows of checkpoints.

All ranks hold the same state at a step boundary, so rank 0 alone writes it, and no rank communicates
to save. What a rank is numbered may change during a run; it is told at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import torch
import torch.distributed as dist

from revdist.config import RunConfig
from revdist.planning.costs import Plan, Profile
from revdist.training import checkpoint_files
from revdist.training.orders import Shares
from revdist.training.parts import Parts
from revdist.training.profile_cache import store_profile
from revdist.training.state import load_training_state, send_state, training_state

TellEvent = Callable[..., None]
"""Called as `event(kind, detail, **facts)`, from any thread."""


@final
class Saver:
    """Saves the state of one replica's run and brings it back."""

    def __init__(self, config: RunConfig, folder: Path, event: TellEvent) -> None:
        """folder: where the run's checkpoints lie; it need not exist. Nothing is read or written here."""
        self._config = config
        self._folder = folder
        self._event = event
        self._profiles: tuple[Profile, ...] = ()

    def recall_profiles(self) -> None:
        """Put the profiles of the newest checkpoint into this machine's cache: what it knows is not measured again."""
        if self._config.planning.profile_cache and checkpoint_files.checkpoints(self._folder):
            for profile in checkpoint_files.read_profiles(checkpoint_files.newest(self._folder)):
                store_profile(profile)

    def remember(self, profiles: Sequence[Profile]) -> None:
        """Profiles of the devices of all ranks; later checkpoints hold them."""
        self._profiles = tuple(profiles)

    def save(
        self,
        parts: Parts,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        rank: int,
        shares: Shares,
        plans: Sequence[Plan] = (),
    ) -> None:
        """Save the state at a step boundary that all ranks have reached. May be called on every rank.

        plans: what the ranks run, as far as it is known.
        """
        if rank != 0:
            return
        from revdist.training import checkpoint  # seconds to import, which the first step need not wait for

        progress = checkpoint_files.Progress(
            step=step,
            seed=self._config.seed,
            global_batch=self._config.global_batch,
            num_samples=parts.order.num_samples,
            generation=shares.generation,
            shares=shares.by_rank,
        )
        state = training_state(parts.model, optimizer)
        path = checkpoint.save(
            self._folder, state, progress, keep=self._config.checkpoint.keep, profiles=self._profiles
        )
        self._event("checkpoint", str(path))

    def resume(self, parts: Parts, optimizer: torch.optim.Optimizer, *, rank: int) -> int:
        """Take up the newest checkpoint and return its step: rank 0 reads it and sends it to the others.

        A collective on the default group. Raises CheckpointError on rank 0 where there is nothing to go on with.
        """
        step = [0]
        if rank == 0:
            from revdist.training import checkpoint

            newest = checkpoint_files.newest(self._folder)
            progress = checkpoint_files.read_progress(newest)
            checkpoint_files.check_same_run(
                progress,
                seed=self._config.seed,
                global_batch=self._config.global_batch,
                num_samples=parts.order.num_samples,
            )
            load_training_state(parts.model, optimizer, checkpoint.read_state(newest))
            step = [progress.step]
        dist.broadcast_object_list(step, src=0)
        send_state(parts.model, optimizer, source=0)
        return step[0]

    def finish(self) -> None:
        """Wait until what was saved is on disk. Raises CheckpointError where the last save failed."""

    def close(self) -> None:
        """Wait for a write under way, whatever becomes of it: this replica fails."""
