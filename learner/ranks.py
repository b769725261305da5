"""Several processes that train as one: rank 0 leads, the others repeat what it does.

Whatever rank 0 calls on its `Leader`, the others call on their own `Trainer` with the same arguments, so that
the collectives inside meet. Announcements wait in the store where the ranks met, without a deadline: a
learner may wait for groups for as long as it likes. Groups travel by id alone: each data-parallel rank
reads its own share of a manifest from Redis.

    rank 0                                     rank 1
    leader.fetch(7, manifest)          ---->   reads its share, in the background, as rank 0 does
    leader.read(session, batch)        ---->   says what it could not read, and hears what others could not
    leader.train_step(groups, 7)       ---->   trains its share as step 7
    leader.save(folder)                ---->   takes part in the gathering
    ranks.dismiss()                    ---->   ends
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from buffer.batches import Manifest
from buffer.client import Stream
from buffer.schema import Group
from buffer.session import Session
from buffer.stream import Frame, read_frames
from learner.batch import Batch, PayloadGone
from learner.checkpoint.folder import State
from learner.checkpoint.saver import Saver
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from learner.errors import CheckpointError, LearnerError
from learner.metrics import Metrics
from learner.model.world import join_world, union_over_ranks
from learner.step import Snapshot, Trainer

log = logging.getLogger("learner")

_LOOK = timedelta(seconds=30)
"""A wait for an announcement is begun again after this long."""


class Load(msgspec.Struct, tag=True, frozen=True):
    """Start anew from the checkpoint in a folder, with a fresh optimizer."""

    folder: str
    """Hugging Face folder, which every rank reads."""


class Fetch(msgspec.Struct, tag=True, frozen=True):
    """Read this rank's share of a step's manifest and make it ready, in the background."""

    step: int
    """Number of the step, from 0."""
    manifest: Manifest
    """Of all ranks; each takes its share."""
    mini_batches: int
    """So many runs of it are trained one after the other."""
    routed: bool
    """With routed experts."""


class Read(msgspec.Struct, tag=True, frozen=True):
    """Take what was fetched last, and agree on what nobody trains."""


class Train(msgspec.Struct, tag=True, frozen=True):
    """Train the share that was taken."""

    step: int
    """Number of the step, from 0."""


class Supervise(msgspec.Struct, tag=True, frozen=True):
    """`Trainer.sft_step`, of which each data-parallel rank takes its share."""

    samples: list[tuple[list[int], list[int]]]
    """(prompt ids, answer ids) of all ranks."""
    lr: float
    """Learning rate of the step."""


class Score(msgspec.Struct, tag=True, frozen=True):
    """`Trainer.score`."""

    sequences: list[list[int]]
    """Token ids, the same on every rank."""
    temperature: float
    """By which logits are divided, above 0."""


class Generate(msgspec.Struct, tag=True, frozen=True):
    """`Trainer.generate`."""

    prompts: list[list[int]]
    """Token ids of each."""
    max_new_tokens: int
    """Of an answer."""
    eos_id: int
    """Token that ends an answer."""
    temperature: float
    """0: greedy."""
    seed: int
    """Of the draws; the same on every rank."""


class Export(msgspec.Struct, tag=True, frozen=True):
    """`Trainer.export`."""


class Save(msgspec.Struct, tag=True, frozen=True):
    """Save this rank's pieces of a checkpoint."""

    folder: str
    """Of all checkpoints."""
    name: str
    """Of this one, `step-<version>-<epoch>`."""


class GoOn(msgspec.Struct, tag=True, frozen=True):
    """`Trainer.load_checkpoint`; the trainer is not used any more if it fails."""

    folder: str
    """That of the checkpoint."""


class Keep(msgspec.Struct, tag=True, frozen=True):
    """`Trainer.snapshot`; only the newest is kept."""


class GoBack(msgspec.Struct, tag=True, frozen=True):
    """`Trainer.restore` of the newest snapshot."""


class End(msgspec.Struct, tag=True, frozen=True):
    """Nothing more will be announced."""


Order = (
    Load | Fetch | Read | Train | Save | GoOn | Supervise | Score | Generate | Export | Keep | GoBack | End
)


class Ranks:
    """The processes that train together, and the store in which they met."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.store = rank, size, store
        self._said = 0
        self._saying = threading.Lock()

    @classmethod
    def meet(cls, parallel: ParallelConfig) -> Ranks:
        """Joins the ranks that torchrun's variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, which
        share the model as `parallel` says; without them this process is alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            join_world(parallel=parallel)
            return cls()
        rank, address = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
        store = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), size, is_master=rank == 0)
        join_world(dist.PrefixStore("world", store), rank, size, parallel)
        return cls(rank, size, store)

    def say(self, order: Order) -> None:
        """Announces an order to all other ranks. Safe to call from several threads."""
        if self.size > 1:
            assert self.store is not None
            with self._saying:
                self.store.set(f"order/{self._said}", msgspec.msgpack.encode(order))
                self._said += 1

    def hear(self) -> Order:
        """The next order. Raises `LearnerError` when rank 0 is gone."""
        assert self.store is not None
        key = f"order/{self._said}"
        self._said += 1
        while True:
            try:
                self.store.wait([key], _LOOK)
                break
            except dist.DistStoreError:
                continue
            except dist.DistNetworkError as error:
                raise LearnerError(f"rank {self.rank}: rank 0 is gone: {error}") from error
        order = msgspec.msgpack.decode(self.store.get(key), type=Order)
        if self.store.add(f"heard/{key}", 1) == self.size - 1:
            self.store.delete_key(key)
            self.store.delete_key(f"heard/{key}")
            if isinstance(order, End):
                self.store.set("dismissed", b"")
        return order

    def dismiss(self) -> None:
        """Ends the other ranks; returns once they have heard it."""
        self.say(End())
        if self.size > 1:
            assert self.store is not None
            self.store.wait(["dismissed"], _LOOK)


def fetch_share(stream: Stream, order: Fetch, trainer: Trainer) -> list[Frame]:
    """This rank's rows of a manifest, in canonical order, each with its group or why there is none; `trainer`
    makes the groups ready. Raises `BatchError`."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows = order.manifest.share(rank, ranks, order.mini_batches)
    frames = read_frames(stream, rows, routed=order.routed)
    trainer.prepare([frame.group for frame in frames if frame.group is not None], order.step)
    return frames


def agree(frames: Sequence[Frame]) -> tuple[list[Group], dict[str, str]]:
    """This rank's groups, and those that some rank could not read with the reason of their strike. A
    collective of all ranks."""
    unread = [f"{frame.reason} {frame.row.group}" for frame in frames if frame.group is None]
    reasons = dict(line.split(" ", 1)[::-1] for line in union_over_ranks(unread, dist.group.WORLD))
    groups = [frame.group for frame in frames if frame.group is not None]
    return [group for group in groups if group.id not in reasons], reasons


class Leader(Trainer):
    """Rank 0's trainer: every call is announced to the other ranks first. Alone, it is a `Trainer`."""

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        objective: ObjectiveConfig,
        seed: int = 0,
    ) -> None:
        """As `Trainer`."""
        self._ranks = ranks
        ranks.say(Load(str(folder)))
        super().__init__(folder, model, optimizer, objective, seed)

    def fetch(self, session: Session, step: int, manifest: Manifest) -> list[Frame]:
        """Rank 0's share of a step's manifest, made ready; called by a thread beside the step before."""
        order = Fetch(step, manifest, self._objective.mini_batches, self._objective.routing_replay)
        self._ranks.say(order)
        return fetch_share(session.stream, order, self)

    def read(self, session: Session, batch: Batch) -> list[Group]:
        """Rank 0's groups of a batch; the step trains without those that some rank cannot read.

        Raises `PayloadGone` if the step was trained, with all of them, before.
        """
        self._ranks.say(Read())
        groups, reasons = agree(batch.frames)
        rows = {row.group: row for row in batch.manifest.rows}
        for group, reason in reasons.items():
            (frame,) = read_frames(session.stream, [rows[group]], routed=self._objective.routing_replay)
            if batch.step < session.version:
                raise PayloadGone(f"step {batch.step} cannot be trained again ({reason}): {frame.problem}")
            log.warning("step %d trains without a group (%s): %s", batch.step, reason, frame.problem)
            session.strike(batch.step, group, reason, frame.payload)
        return groups

    def train_step(self, groups: Sequence[Group], step: int) -> Metrics:
        """As `Trainer.train_step`, of the groups that `read` gave."""
        self._ranks.say(Train(step))
        return super().train_step(groups, step)

    def sft_step(self, samples: Sequence[tuple[list[int], list[int]]], lr: float) -> dict[str, float]:
        """As `Trainer.sft_step`, shared by the data-parallel ranks."""
        self._ranks.say(Supervise(list(samples), lr))
        return super().sft_step(_share(samples), lr)

    def export(self) -> dict[str, torch.Tensor]:
        """As `Trainer.export`."""
        self._ranks.say(Export())
        return super().export()

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """As `Trainer.score`."""
        self._ranks.say(Score([list(sequence) for sequence in sequences], temperature))
        return super().score(sequences, temperature)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_id: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """As `Trainer.generate`."""
        listed = [list(prompt) for prompt in prompts]
        self._ranks.say(Generate(listed, max_new_tokens, eos_id, temperature, seed))
        return super().generate(prompts, max_new_tokens, eos_id, temperature, seed)

    def begin_checkpoint(self, saver: Saver, folder: Path, state: State) -> None:
        """Has every rank begin to save its pieces, rank 0 by `saver`."""
        self._ranks.say(Save(str(folder), state.name))
        saver.begin(state.name, self.parts(), state)
        self.before_update = saver.copied

    def load_checkpoint(self, folder: Path) -> None:
        """As `Trainer.load_checkpoint`."""
        self._ranks.say(GoOn(str(folder)))
        super().load_checkpoint(folder)

    def snapshot(self) -> Snapshot:
        """As `Trainer.snapshot`."""
        self._ranks.say(Keep())
        return super().snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """As `Trainer.restore`, of the newest snapshot."""
        self._ranks.say(GoBack())
        super().restore(snapshot)


class Follower:
    """Any other rank: does what is announced, until it is dismissed or rank 0 is gone."""

    def __init__(self, ranks: Ranks, stream: Stream, load: Callable[[Path], Trainer]) -> None:
        self._ranks, self._stream, self._load = ranks, stream, load
        self._groups: list[Group] = []
        self._saver: Saver | None = None

    def follow(self) -> None:
        """Returns when dismissed. Raises `LearnerError` when rank 0 is gone."""
        with ThreadPoolExecutor(1) as background:
            self._follow(background)
        if self._saver is not None:
            self._saver.wait()  # rank 0 waits for what this rank writes
            self._saver.close()

    def _follow(self, background: ThreadPoolExecutor) -> None:
        trainer = kept = fetched = None
        while not isinstance(order := self._ranks.hear(), End):
            match order:
                case Load(folder):
                    trainer = self._load(Path(folder))
                case Fetch():
                    fetched = background.submit(fetch_share, self._stream, order, trainer)
                case Read():
                    self._groups, _ = agree(fetched.result())
                case Train(step):
                    trainer.train_step(self._groups, step)
                case Save(folder, name):
                    self._save(Path(folder), name, trainer)
                case GoOn(folder):
                    with suppress(CheckpointError):  # rank 0 says why, and what next
                        trainer.load_checkpoint(Path(folder))
                case Supervise(samples, lr):
                    trainer.sft_step(_share(samples), lr)
                case Score(sequences, temperature):
                    trainer.score(sequences, temperature)
                case Generate():
                    trainer.generate(**msgspec.structs.asdict(order))
                case Export():
                    trainer.export()
                case Keep():
                    kept = trainer.snapshot()
                case GoBack():
                    trainer.restore(kept)

    def _save(self, folder: Path, name: str, trainer: Trainer) -> None:
        if self._saver is None:
            self._saver = Saver(folder, rank=self._ranks.rank, ranks=self._ranks.size)
        self._saver.wait()  # rank 0's is complete, so this is soon
        self._saver.begin(name, trainer.parts())
        trainer.before_update = self._saver.copied


def _share(samples: Sequence[tuple[list[int], list[int]]]) -> Sequence[tuple[list[int], list[int]]]:
    """Those of this data-parallel rank."""
    return samples[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
