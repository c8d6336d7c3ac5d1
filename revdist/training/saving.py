"""When and by whom training state is saved and taken up again: what a replica knows of checkpoints.

All ranks hold the same state at a step boundary, so rank 0 alone writes it, and no rank communicates
to save. What a rank is numbered may change during a run; it is told at each call. Training waits for a
copy of the state in host memory and goes on while a thread writes it.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from revdist.config import RunConfig
from revdist.errors import CheckpointError
from revdist.planning.costs import Plan, Profile
from revdist.training import checkpoint_files
from revdist.training.checkpoint_files import PROFILES_FILE, Checkpoint, Contents, Progress
from revdist.training.checkpoint_folders import Folder, Place, open_folder
from revdist.training.generators import generator_states, restore_generators
from revdist.training.host_tensors import Staging
from revdist.training.orders import Shares
from revdist.training.parts import Parts
from revdist.training.profile_cache import store_profile
from revdist.training.reports import TellEvent
from revdist.training.state import load_training_state, send_state, training_state

_PATIENCE_S = 30.0
"""How long a replica that fails waits for a write under way."""
_SLOW_WRITE_S = 60.0
"""How long a save waits for the one before it; the other ranks wait for this one, and must not give it up."""
_BEAT_S = 10.0
"""How long ranks wait for one that writes before all of them wait again: no collective may take long."""
_GENERATORS_FILE = "generators.json"
_CONFIG_FILE = "config.yaml"


@final
class Saver:
    """Saves the state of one replica's run and brings it back."""

    def __init__(self, config: RunConfig, place: Place, event: TellEvent) -> None:
        """place: where the run's checkpoints lie; it need not exist. Nothing is read or written here."""
        self._config = config
        self._place = place
        self._event = event
        self.known_sizes: tuple[int, ...] = ()
        """Micro-batch sizes of the profiles recalled: the ones to use again on a device that is known."""
        self._profiles: tuple[Profile, ...] = ()
        self._staging = Staging()
        self._whole_step: int | None = None
        """Of the newest checkpoint that this replica has written or read."""
        self._torn: frozenset[str] = frozenset()
        """Names of checkpoints that were found to be torn."""
        self._writing: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def recall_profiles(self) -> None:
        """Put the profiles of the newest checkpoint into this machine's cache: what it knows is not measured again."""
        if not self._config.planning.profile_cache:
            return
        profiles = checkpoint_files.read_profiles(self._place)
        for profile in profiles:
            store_profile(profile)
        if self._config.micro_batch is None and not self._config.planning.micro_batches:
            self.known_sizes = tuple(sorted({profile.micro_batch for profile in profiles}))

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

        Returns once the state is copied, after waiting for the save before it, which takes the place of this one
        if it takes too long. A save that fails is an event; `finish` raises it if it was the last one.
        Raises CheckpointError for an optimizer that cannot be saved.
        """
        if rank != 0:
            return
        began_s = time.perf_counter()
        if not self.wait(_SLOW_WRITE_S):
            waited = f"the one before it is being written for more than {_SLOW_WRITE_S:.0f} s"
            self._event("checkpoint-failed", f"no checkpoint of step {step}: {waited}; save less often, or elsewhere")
            return
        if step == self._whole_step:  # it would be replaced by the same, and be missing meanwhile
            return
        live = training_state(parts.model, optimizer)
        progress = Progress(
            step=step,
            seed=self._config.seed,
            global_batch=self._config.global_batch,
            num_samples=parts.order.num_samples,
            generation=shares.generation,
            shares=shares.by_rank,
        )
        try:
            state = self._staging.copy(live)
        except MemoryError:
            num_bytes = sum(tensor.nbytes for tensor in live.values())
            self._fail(
                CheckpointError(f"no host memory for a copy of {num_bytes} bytes, from which step {step} is saved")
            )
            return
        generators = generator_states()
        pause_s = time.perf_counter() - began_s
        documents = functools.partial(self._documents, tuple(plans), generators)
        self._writing = threading.Thread(
            target=self._write, args=(state, progress, documents, pause_s), name="revdist-save", daemon=True
        )
        self._writing.start()

    def save_alone(
        self, parts: Parts, optimizer: torch.optim.Optimizer, *, step: int, shares: Shares, plans: Sequence[Plan]
    ) -> None:
        """Save unless somebody has saved as much, and wait until it is written. Raises CheckpointError."""
        self.wait()
        if all(one.step < step for one in checkpoint_files.checkpoints(self._place)):
            self.save(parts, optimizer, step=step, rank=0, shares=shares, plans=plans)
            self.finish()

    def resume(self, parts: Parts, optimizer: torch.optim.Optimizer, *, rank: int) -> int:
        """Take up the newest whole checkpoint and return its step: rank 0 reads it and sends it to the others.

        A collective on the default group. Raises CheckpointError on rank 0 where there is nothing to go on with.
        """
        step = [0]
        if rank == 0:
            step = [self._read(parts, optimizer)]
        dist.broadcast_object_list(step, src=0)
        send_state(parts.model, optimizer, None, source=0)
        return step[0]

    def wait(self, patience_s: float | None = None) -> bool:
        """Wait for a write under way; False where it takes longer."""
        if self._writing is None:
            return True
        self._writing.join(patience_s)
        return not self._writing.is_alive()

    def wait_with_others(self) -> None:
        """Wait until no rank writes, however long that takes. A collective on the default group."""
        written = torch.zeros(1)
        while not written:
            written.fill_(self.wait(_BEAT_S))
            dist.all_reduce(written, op=dist.ReduceOp.MIN)

    def finish(self) -> None:
        """Wait until what was saved is on disk.

        Raises CheckpointError where the last save failed, naming the newest checkpoint there is.
        """
        self.wait()
        if self._failure is None:
            return
        found = checkpoint_files.checkpoints(self._place)
        there = f"the newest there is: {found[-1]}" if found else "there is none before it"
        raise CheckpointError(f"the run's last checkpoint failed, {there}: {self._failure.message}")

    def close(self) -> None:
        """Wait a while for a write under way, whatever becomes of it: this replica has failed."""
        self.wait(_PATIENCE_S)

    def _documents(self, plans: Sequence[Plan], generators: Mapping[str, Any]) -> dict[str, str]:
        return {
            _CONFIG_FILE: self._config.to_yaml(),
            "plans.json": json.dumps([json.loads(plan.to_json()) for plan in plans]),
            PROFILES_FILE: checkpoint_files.profiles_to_json(self._profiles),
            _GENERATORS_FILE: json.dumps(generators),
        }

    def _write(
        self,
        state: Mapping[str, Tensor],
        progress: Progress,
        documents: Callable[[], Mapping[str, str]],
        pause_s: float,
    ) -> None:
        """Write one checkpoint; runs beside the training."""
        began_s = time.perf_counter()
        try:
            from revdist.training import checkpoint  # seconds to import, for which no step waits

            folder = open_folder(self._place)
            saved = checkpoint.save(folder, state, progress, documents())
        except CheckpointError as error:
            self._fail(error)
            return
        except Exception as error:  # a storage's own kind of error must not end the thread without a word
            self._fail(CheckpointError(f"cannot write a checkpoint in {self._place}: {type(error).__name__}: {error}"))
            return
        self._failure = None
        self._whole_step = progress.step
        self._torn -= {saved.name}
        self._event(
            "checkpoint",
            str(saved),
            saved_step=progress.step,
            bytes=sum(tensor.nbytes for tensor in state.values()),
            seconds=time.perf_counter() - began_s,
            pause_s=pause_s,
        )
        self._prune(folder, progress.step)

    def _prune(self, folder: Folder, step: int) -> None:
        policy = self._config.checkpoint
        try:
            checkpoint_files.prune(
                folder, step=step, keep=policy.keep, keep_every_steps=policy.keep_every_steps, torn=self._torn
            )
        except (OSError, CheckpointError) as error:
            self._event("checkpoint-failed", f"cannot remove older checkpoints in {folder}: {error}")

    def _fail(self, error: CheckpointError) -> None:
        self._failure = error
        self._event("checkpoint-failed", error.message)

    def _read(self, parts: Parts, optimizer: torch.optim.Optimizer) -> int:
        """Put the newest whole checkpoint in place and return its step."""
        from revdist.training import checkpoint

        found = checkpoint_files.newest_whole(self._place)
        for name, fault in found.torn.items():
            self._event(
                "checkpoint-failed", f"torn and left out: {name}: {fault}; going on from {found.checkpoint.name}"
            )
        self._torn = frozenset(found.torn)
        progress = found.contents.progress
        checkpoint_files.check_same_run(
            progress,
            seed=self._config.seed,
            global_batch=self._config.global_batch,
            num_samples=parts.order.num_samples,
        )
        self._check_optimizer(found.checkpoint, found.contents)
        load_training_state(parts.model, optimizer, checkpoint.read_state(found.checkpoint))
        self._whole_step = progress.step
        if _GENERATORS_FILE in found.contents.files:
            restore_generators(found.checkpoint.read(_GENERATORS_FILE).decode())
        self._event("resumed", f"{found.checkpoint}, written by {_name_versions(found.contents.versions)}")
        return progress.step

    def _check_optimizer(self, found: Checkpoint, contents: Contents) -> None:
        """Raise CheckpointError where the state is of another optimizer."""
        if _CONFIG_FILE not in contents.files:
            return
        config = yaml.safe_load(found.read(_CONFIG_FILE))
        before, now = config["optimizer"]["factory"], self._config.optimizer.factory
        if before != now:
            raise CheckpointError(
                f"{found} holds the state of {before}, and optimizer.factory is {now}: set it back, or start a new run"
            )


def _name_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())
