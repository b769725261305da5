"""Checkpoints: what is saved comes back bit for bit, in other shares too; what is damaged does not."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject

from learner.checkpoint import folder as folders
from learner.checkpoint import schedule
from learner.checkpoint.folder import State, complete, oldest_kept, prune
from learner.checkpoint.saver import Saver
from learner.checkpoint.schedule import Checkpoints
from learner.checkpoint.snapshot import Snapshot
from learner.checkpoint.state import Part
from learner.checkpoint.writer import Written
from learner.config import CheckpointConfig, KlConfig, ModelConfig, ObjectiveConfig
from learner.convert.dist_checkpoint import BACKEND
from learner.convert.folders import mcore_to_hf
from learner.errors import CheckpointError, ConfigError
from learner.ranks import Leader, Ranks
from learner.step import Trainer
from tests.unit.learner.families import make_family
from tests.unit.learner.test_step import QUICK, batch_of, digest, make_trainer


def state_of(trainer: Trainer) -> State:
    memory = msgspec.Raw(b'{"head": 3}')
    return State(trainer.version, "d", "d", 7, 0, memory, trainer.optimizer_steps())


def save(trainer: Trainer, folder: Path, ranks: Sequence[Sequence[Part]] | None = None) -> Path:
    """A checkpoint of the trainer; `ranks`: saved by several, each with its share."""
    shares = ranks or [trainer.parts()]
    savers = [Saver(folder, rank=rank, ranks=len(shares)) for rank in range(len(shares))]
    try:
        for saver, share in zip(savers, shares, strict=True):
            saver.begin(state_of(trainer).name, share, state_of(trainer))
        for saver in savers:
            written = saver.wait()
            assert written is not None
            assert not written.error, written.error
    finally:
        for saver in savers:
            saver.close()
    return complete(folder)[0].path


def moments(trainer: Trainer) -> list[torch.Tensor]:
    return [part.tensor.clone() for part in trainer.parts()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, Path]:
    """(model, a trainer at version 2 of every kind of layer, its checkpoint)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    make_family("qwen3_next", folder / "model")
    trainer = make_trainer(folder / "model")
    for step in range(2):
        trainer.train_step(batch_of(step), step)
    return folder / "model", trainer, save(trainer, folder / "saved")


def test_a_trainer_goes_on_bit_for_bit(trained: tuple[Path, Trainer, Path]) -> None:
    model, trainer, path = trained
    again = make_trainer(model)
    again.load_checkpoint(path)
    assert again.version == 2
    assert all(map(torch.equal, moments(again), moments(trainer)))
    start = trainer.snapshot()
    for step in (2, 3):
        trainer.train_step(batch_of(step), step)
        again.train_step(batch_of(step), step)
    assert digest(again) == digest(trainer)
    trainer.restore(start)


def test_shares_of_ranks_make_one_checkpoint(trained: tuple[Path, Trainer, Path], tmp_path: Path) -> None:
    """Rank 0 saves the upper rows of every matrix, rank 1 the lower ones; a world of one loads both."""
    model, trainer, _ = trained
    upper, lower = [], []
    for part in trainer.parts():
        half = part.tensor.shape[0] // 2
        for share, rows in ((upper, slice(half, None)), (lower, slice(half))):
            start = (part.start[0] + (rows.start or 0), *part.start[1:])
            if part.tensor[rows].numel():
                share.append(Part(part.key, part.shape, start, part.tensor[rows], main=True))
    path = save(trainer, tmp_path, [upper, lower])
    files = {file.name for file in path.iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", "random-1.bin"} <= files
    again = make_trainer(model)
    again.load_checkpoint(path)
    assert all(map(torch.equal, moments(again), moments(trainer)))


def test_replicas_are_saved_once(trained: tuple[Path, Trainer, Path], tmp_path: Path) -> None:
    trainer = trained[1]
    parts = trainer.parts()
    copies = [msgspec.structs.replace(part, main=False) for part in parts[1:]]
    path = save(trainer, tmp_path, [[parts[0], *copies]])
    assert (path / "__0_0.distcp").stat().st_size < parts[0].tensor.nbytes + 4000


@pytest.mark.filterwarnings("ignore")  # torch deprecates much of what Megatron-Core's reader calls
def test_megatron_core_and_launch_convert_read_it(
    trained: tuple[Path, Trainer, Path], tmp_path: Path
) -> None:
    model, trainer, path = trained
    wanted = {
        name: value
        for name, value in make_trainer(model)._model.sharded_state_dict(
            metadata={"non_homogeneous_layers": True}
        ).items()
        if not isinstance(value, ShardedObject)
    }  # fmt: skip
    loaded = dist_checkpointing.load(wanted, str(path))
    held = trainer._model.state_dict()
    assert all(torch.equal(loaded[name], held[name]) for name in wanted)
    assert CheckpointingConfig(**BACKEND) == CheckpointingConfig("torch_dist")
    mcore_to_hf(path, model, tmp_path / "hf", lambda *_: None)
    assert digest(make_trainer(tmp_path / "hf")) == digest(trainer)


def test_the_copy_is_of_the_moment_it_was_begun(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step's optimizer waits for a copy that is slow."""
    folder, _ = make_checkpoint()
    model = ModelConfig(path=str(folder), micro_batch_tokens=64)
    trainer = Leader(Ranks(), folder, model, QUICK, ObjectiveConfig(), seed=3)
    again = make_trainer(folder)
    trainer.train_step(batch_of(0), 0)
    then, random, take = digest(trainer), torch.get_rng_state(), Snapshot.take
    monkeypatch.setattr(Snapshot, "take", lambda *args: time.sleep(1) or take(*args))
    with Saver(tmp_path) as saver:
        trainer.begin_checkpoint(saver, tmp_path, state_of(trainer))
        trainer.train_step(batch_of(1), 1)
        assert saver.stalled_s > 0.5
        torch.rand(3)
        with pytest.raises(CheckpointError, match="another is being written"):
            saver.begin("step-00000001-7", trainer.parts(), state_of(trainer))
        assert saver.wait() is not None
        assert saver.finished() is None
    again.load_checkpoint(complete(tmp_path)[0].path)
    assert digest(again) == then != digest(trainer)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_optimizer_that_made_no_step_stays_fresh(make_checkpoint: Callable, tmp_path: Path) -> None:
    """A first step that was skipped leaves version 1 without moments."""
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    trainer.version = 1
    again = make_trainer(folder)
    again.load_checkpoint(save(trainer, tmp_path))
    assert (again.version, again.optimizer_steps()) == (1, 0)
    for one in (trainer, again):
        one.train_step(batch_of(1), 1)
    assert digest(again) == digest(trainer)


def test_bf16_goes_on_from_its_fp32_weights(make_checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = make_checkpoint()
    model = ModelConfig(path=str(folder), micro_batch_tokens=64, dtype="bfloat16")
    optimizer = msgspec.structs.replace(QUICK, lr=1e-4)  # most updates are below what bf16 shows
    trainer, again = (Trainer(folder, model, optimizer, ObjectiveConfig()) for _ in range(2))
    for step in range(2):
        trainer.train_step(batch_of(step), step)
    again.load_checkpoint(save(trainer, tmp_path))
    assert all(map(torch.equal, moments(again), moments(trainer)))
    for one in (trainer, again):
        for step in range(2, 5):
            one.train_step(batch_of(step), step)
    assert all(map(torch.equal, moments(again), moments(trainer)))
    assert {part.tensor.dtype for part in trainer.parts()} == {torch.float32, torch.bfloat16}


def test_the_reference_is_the_policy_of_step_0(make_checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = make_checkpoint()
    config = ObjectiveConfig(kl=KlConfig(coefficient=0.5))

    def make() -> Trainer:
        return Trainer(folder, ModelConfig(path=str(folder), micro_batch_tokens=64), QUICK, config)

    trainer, again = make(), make()
    trainer.train_step(batch_of(0), 0)
    again.load_checkpoint(save(trainer, tmp_path))
    for one in (trainer, again):
        assert one.train_step(batch_of(1), 1)["kl_reference_k3"] > 0
    assert digest(again) == digest(trainer)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
def test_damage_is_refused_by_name(trained: tuple[Path, Trainer, Path], tmp_path: Path, file: str) -> None:
    """One byte in the middle of a file is another, or the file is cut in half."""
    model, _, whole = trained
    path = shutil.copytree(whole, tmp_path / whole.name)
    content = bytearray((path / file).read_bytes())
    if file == "__0_0.distcp":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    (path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        make_trainer(model).load_checkpoint(path)


def test_a_checkpoint_of_another_model_is_refused(make_checkpoint: Callable, tmp_path: Path) -> None:
    path = save(make_trainer(make_checkpoint()[0]), tmp_path)
    wider, _ = make_checkpoint(intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"got shape \(.*\), expected \(.*\) by config.json"):
        make_trainer(wider).load_checkpoint(path)


def test_a_writer_that_dies_is_replaced(make_checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    with Saver(tmp_path) as saver:
        saver.begin("step-00000001-7", trainer.parts(), state_of(trainer))
        assert saver._process is not None
        os.kill(saver._process.pid, signal.SIGKILL)
        written = saver.wait()
        assert written is not None
        assert written.error == "the process that writes it ended with -9"
        assert complete(tmp_path) == []
        saver.begin("step-00000001-7", trainer.parts(), state_of(trainer))
        written = saver.wait()
        assert written is not None
        assert not written.error
    assert [one.version for one in complete(tmp_path)] == [0]


def test_a_writer_that_dies_while_the_copy_is_made_is_replaced(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipe stays open until the thread that copies has found out."""
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    with Saver(tmp_path) as saver:
        take = saver._snapshot.take
        monkeypatch.setattr(saver._snapshot, "take", lambda parts: (time.sleep(0.5), take(parts))[1])
        saver.begin("step-00000001-7", trainer.parts(), state_of(trainer))
        assert saver._process is not None
        os.kill(saver._process.pid, signal.SIGKILL)
        written = saver.wait()
    assert written is not None
    assert written.error == "the process that writes it ended with -9"


def make_folders(
    folder: Path, *versions: int, lineage: int = 0, epoch: int = 1, digest: str = "d", weights: str = ""
) -> None:
    for version in versions:
        state = State(version, digest, weights or digest, epoch, lineage, msgspec.Raw(b"{}"))
        path = folder / state.name
        path.mkdir(parents=True)
        (path / "state.json").write_bytes(msgspec.json.encode(state))


def versions_in(folder: Path) -> list[int]:
    return [one.version for one in complete(folder)]


def test_the_last_ones_and_the_archive_are_kept(tmp_path: Path) -> None:
    config = CheckpointConfig(every=2, keep_last=2, keep_every=8)
    make_folders(tmp_path, 2, 4, 6, 8, 10, 12, 14)
    oldest = oldest_kept(tmp_path, config, 14)
    assert oldest == 12
    prune(tmp_path, config, oldest)
    assert versions_in(tmp_path) == [14, 12, 8]
    assert list(tmp_path.glob(".*")) == []


def test_nobody_waits_for_old_checkpoints_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path, 2, 4, 6)
    may_go, prune = threading.Event(), schedule.prune
    monkeypatch.setattr(schedule, "prune", lambda *told: may_go.wait(10) and prune(*told))
    session = SimpleNamespace(checkpoint=lambda *_: None)
    with Checkpoints(session, CheckpointConfig(keep_last=1), tmp_path, 4) as checkpoints:
        checkpoints._state = complete(tmp_path)[0].state
        checkpoints._conclude(Written("", 1.0))
        assert versions_in(tmp_path) == [6, 4, 2]
        may_go.set()
    assert versions_in(tmp_path) == [6]


def test_what_is_newer_than_the_latest_does_not_count(tmp_path: Path) -> None:
    """Checkpoints that a fork will undo, or that another learner makes, keep no payloads."""
    make_folders(tmp_path, 2, 4, 6)
    assert oldest_kept(tmp_path, CheckpointConfig(keep_last=2), 4) == 2


def test_unfinished_folders_are_none_and_lineages_come_first(tmp_path: Path) -> None:
    make_folders(tmp_path, 8, 10)
    make_folders(tmp_path, 6, lineage=1, epoch=2)
    folders.unfinished(tmp_path, "step-00000012-3").mkdir()
    assert versions_in(tmp_path) == [6, 10, 8]
    folders.remove_unfinished(tmp_path)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"every": 0, "keep_every": 5}, "got 5 with every = 0, expected a multiple"),
        ({"every": 10, "keep_every": 15}, "got 15 with every = 10, expected a multiple"),
    ],
)
def test_an_archive_that_would_stay_empty_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CheckpointConfig(**fields)
