"""A fork that the user asks for: from the newest checkpoint, under other rules."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from buffer.client import Stream
from buffer.members import Rules
from buffer.session import Session
from learner.checkpoint.folder import State
from learner.checkpoint.restore import join
from learner.errors import CheckpointError
from tests.contract.harness import Run, digest


@pytest.fixture
def run(stream: Stream) -> Run:
    """B = 2, eta = 1: three steps are trained."""
    run = Run(stream, batch=2, eta=1).start("a")
    for step in range(3):
        run.queue("a", 2)
        run.assign(step)
        run.commit(step + 1)
        run.applied("a", step + 1)
    return run


def checkpoint(folder: Path, session: Session, version: int) -> None:
    state = State(version, digest(version), digest(version), 1, 0, msgspec.Raw(session.memory()))
    (folder / state.name).mkdir(parents=True)
    (folder / state.name / "state.json").write_bytes(msgspec.json.encode(state))


def other(run: Run, **settings: int) -> Rules:
    return Run(run.stream, **{"batch": 3, "eta": 2, "max_steps": 500, **settings}).rules


def test_it_goes_on_from_the_newest_checkpoint_under_the_new_rules(run: Run, tmp_path: Path) -> None:
    checkpoint(tmp_path, Session.join(run.stream, run.rules), 2)
    session, found = join(run.stream, other(run), tmp_path, fork=True)
    assert (session.version, session.head, [one.version for one in found]) == (2, 2, [2])
    ledger = run.snapshot()
    numbers = [ledger.number(name) for name in ("lineage", "batch", "cap", "eta", "max_steps", "version")]
    assert numbers == [1, 3, 3, 2, 500, 2]
    assert ledger.counts.dropped == {"lineage": 2}, "the third step is undone"
    again, _ = join(run.stream, other(run), tmp_path)
    assert again.known.lineage == 1


def test_without_a_checkpoint_it_goes_back_to_the_start(run: Run, tmp_path: Path) -> None:
    session, _ = join(run.stream, other(run), tmp_path, fork=True)
    assert (session.version, run.snapshot().counts.trained) == (0, 0)


def test_what_cannot_be_forked_is_refused_and_nothing_changes(run: Run, tmp_path: Path) -> None:
    before = run.keys()
    with pytest.raises(CheckpointError, match=r"stream.shards: got 4, run .* has 0"):
        join(run.stream, other(run, shards=4), tmp_path, fork=True)
    assert run.keys() == before
    nowhere = Stream(run.stream.redis, "nowhere")
    with pytest.raises(CheckpointError, match=r"--fork: no run .*; leave it out for a new run"):
        join(nowhere, run.rules, tmp_path, fork=True)
