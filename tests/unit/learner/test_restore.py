"""Which checkpoint a run goes on from, and when it cannot, or only in a new lineage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from buffer.config import StreamConfig
from buffer.members import Rules
from buffer.recovery import Known
from learner.checkpoint.folder import State, complete
from learner.checkpoint.restore import Restore
from learner.config import CheckpointConfig
from learner.errors import CheckpointError
from tests.unit.learner.test_checkpoint import make_folders, versions_in

START = "start"


class FakeSession:
    """A run whose committed version v has the digest `v<v>`."""

    def __init__(self, version: int, *, covered: int = -1, checkpoint: int = 0) -> None:
        digests = {number: f"v{number}" for number in range(1, version + 1)} | {0: START}
        self.known = Known("n", 0, version + 1, 0, version, checkpoint, covered, {}, digests)
        self.version, self.head = version, version + 1
        self.stream = SimpleNamespace(run="run")
        self.forked: list[int] = []
        self.committed: list[tuple[int, int]] = []

    def fork(self, at: int, reason: str, rules: Rules) -> None:
        self.forked.append(at)

    def checkpoint(self, version: int, digest: str, oldest: int) -> None:
        assert digest == f"v{version}"
        self.committed.append((version, oldest))


class FakeTrainer:
    """Weights are a word; those of a checkpoint are its digest, or what `weights` says of it."""

    def __init__(self, start: str, weights: dict[int, str]) -> None:
        self.version, self.word, self.weights = 0, start, weights

    def load_checkpoint(self, path: Path) -> None:
        state = next(one.state for one in complete(path.parent) if one.path == path)
        if self.weights.get(state.version) == "unreadable":
            raise CheckpointError("half of it is gone")
        self.version, self.word = state.version, self.weights.get(state.version, state.weights)


@pytest.fixture
def restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """(session, checkpoints' versions, ...) to the trainer that the run goes on with."""
    monkeypatch.setattr("learner.checkpoint.restore._digest", lambda trainer: trainer.word)

    def run(
        session: FakeSession, *versions: int, start: str = START, matters: bool = False, **weights: str
    ) -> FakeTrainer:
        for version in versions:
            make_folders(tmp_path, version, digest=f"v{version}")
        found, config = complete(tmp_path), CheckpointConfig()
        trained = {int(name[1:]): word for name, word in weights.items()}
        rules = Rules.of(StreamConfig())
        made: Any = Restore(session, found, lambda: FakeTrainer(start, trained), config, rules)
        return made.trainer(start_matters=matters)

    return run


def test_the_newest_one_that_was_committed(restore: Callable, tmp_path: Path) -> None:
    session = FakeSession(7, covered=3, checkpoint=6)
    assert restore(session, 4, 6).version == 6
    assert (session.forked, session.committed) == ([], [])


def test_one_whose_commit_never_came_is_committed_now(restore: Callable) -> None:
    session = FakeSession(7, covered=1, checkpoint=4)
    assert restore(session, 2, 4, 6).version == 6
    assert session.committed == [(6, 4)]


def test_one_of_undone_steps_is_passed_over(restore: Callable, tmp_path: Path) -> None:
    session = FakeSession(7, checkpoint=4)
    session.known.versions[6] = "another"
    assert restore(session, 4, 6).version == 4
    assert versions_in(tmp_path) == [6, 4]


def test_one_that_came_out_differently_is_good(restore: Callable, tmp_path: Path) -> None:
    """Trained again on a GPU, version 6 has other weights than those that were committed for it."""
    make_folders(tmp_path, 6, digest="v6", weights="twin")
    trainer = restore(FakeSession(7, covered=3, checkpoint=6))
    assert (trainer.version, trainer.word) == (6, "twin")


@pytest.mark.parametrize("damage", ["unreadable", "other weights"])
def test_a_damaged_one_is_put_aside(restore: Callable, tmp_path: Path, damage: str) -> None:
    session = FakeSession(7, covered=3, checkpoint=6)
    assert restore(session, 4, 6, v6=damage).version == 4
    assert versions_in(tmp_path) == [4]
    assert (tmp_path / "damaged-step-00000006-1").is_dir()


def test_steps_whose_payloads_are_deleted_are_undone(restore: Callable, tmp_path: Path) -> None:
    session = FakeSession(9, covered=5, checkpoint=6)
    session.known.versions[8] = "another"
    assert restore(session, 4, 6, 8, v6="unreadable").version == 4
    assert session.forked == [4]
    assert versions_in(tmp_path) == [4]


def test_without_any_it_begins_at_version_0(restore: Callable) -> None:
    assert restore(FakeSession(7)).version == 0


@pytest.mark.parametrize(
    ("covered", "start", "matters", "said"),
    [
        (2, START, False, "no checkpoint to go on from"),
        (-1, "other", False, "no checkpoint to go on from"),
        (-1, "other", True, "the reference of objective.kl"),
    ],
)
def test_what_cannot_go_on_says_so(
    restore: Callable, covered: int, start: str, matters: bool, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        restore(FakeSession(7, covered=covered), start=start, matters=matters)


def test_states_are_what_they_were(tmp_path: Path) -> None:
    make_folders(tmp_path, 4, digest="v4")
    assert complete(tmp_path)[0].state == State(4, "v4", "v4", 1, 0, msgspec.Raw(b"{}"))
