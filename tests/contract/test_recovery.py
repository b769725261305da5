"""A learner and its run after crashes: sessions, checkpoints, recorders, a server that came back older."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from buffer.client import Stream
from buffer.errors import Fenced, ForeignRun, LostSteps, SettingsMismatch, StreamError
from buffer.members import JoinRecorder, Leave, RecorderBeat
from buffer.record import RecordFolder, describe_run, fetch_step
from buffer.session import Session
from buffer.stream import read_frames
from tests.contract.harness import Run, digest


@pytest.fixture
def run(stream: Stream) -> Run:
    """B = 2, eta = 2, one actor."""
    return Run(stream, batch=2, eta=2).start("a")


def take_over(run: Run, memory: bytes = b"") -> Session:
    """A learner that joins the run, as after a crash."""
    session = Session.join(run.stream, run.rules, memory=memory)
    run.epochs["learner"] = session.epoch
    return session


def step(run: Run, session: Session) -> list[str]:
    """One step: two groups generated, trained, committed and served; the groups."""
    run.queue("a", 2)
    at = session.head
    groups = [row.group for row in session.assign(at).manifest.groups()]
    session.commit(at + 1, digest(at + 1))
    run.applied("a", at + 1)
    return groups


def test_a_restored_learner_replays_the_same_batches(run: Run) -> None:
    session = take_over(run)
    trained = [step(run, session) for _ in range(3)]
    session.checkpoint(1, digest(1), 1)
    memory = session.memory()
    run.queue("a", 2)
    assigned = [row.group for row in session.assign(3).manifest.groups()]

    restored = take_over(run, memory)  # at version 1; steps 1 and 2 again, then step 3, then on
    assert (restored.head, restored.version) == (4, 3)
    for at, groups in enumerate([*trained[1:], assigned], start=1):
        manifest = restored.assign(at).manifest
        assert [row.group for row in manifest.groups()] == groups
        assert all(frame.group for frame in read_frames(run.stream, manifest.groups()))
    assert restored.commit(2, "a twin's").digest == digest(2), (
        "of a retrained version the first digest counts"
    )
    assert restored.commit(4, digest(4)).version == 4
    with pytest.raises(StreamError, match="covered"):
        restored.assign(0)
    with pytest.raises(Fenced):
        session.commit(4, digest(4))


def test_payloads_stay_until_the_oldest_checkpoint_covers_them(run: Run) -> None:
    session = take_over(run)
    for _ in range(4):
        step(run, session)
    assert run.snapshot().sizes["payloads"] == 8
    session.checkpoint(3, digest(3), 1)
    assert run.snapshot().sizes["payloads"] == 6
    session.checkpoint(4, digest(4), 4)
    assert run.snapshot().sizes["payloads"] == 0


def test_a_checkpoint_is_due_before_too_many_steps(stream: Stream) -> None:
    run = Run(stream, batch=1, eta=2, uncovered_max=2).start("a")
    session = take_over(run)
    for at in range(2):
        run.queue("a", 1)
        session.assign(at)
        session.commit(at + 1, digest(at + 1))
    run.queue("a", 1)
    assert (session.assign(2).status, session.assign(2).reason) == ("wait", "uncovered")
    session.checkpoint(1, digest(1), 1)
    assert session.assign(2).status == "batch"


def test_a_server_that_came_back_older_is_brought_forward(run: Run) -> None:
    session = take_over(run)
    step(run, session)
    file = run.dump()
    trained = step(run, session)
    late = run.admit("a")
    run.come_back(file)
    assert run.snapshot().number("head") == 1
    session.assign(2)  # finds the server behind, and reconciles
    ledger = run.snapshot()
    assert [ledger.number(name) for name in ("head", "version")] == [2, 2]
    assert (ledger.counts.trained, ledger.counts.rollbacks) == (4, 1)
    assert [row.group for row in session.assign(1).manifest.groups()] == trained
    assert run.heartbeat("a", late.token).lost == [late.token]
    assert run.admit("a").group not in trained


def test_leases_nobody_renews_after_a_restart_are_lost(run: Run) -> None:
    session = take_over(run)
    kept, gone = run.leases("a", 2)
    session._server = "another process"
    session.reconcile()
    run.heartbeat("a", kept.token)
    run.elapse(60_000)
    run.heartbeat("a", kept.token)
    assert run.snapshot().counts.dropped == {"lost": 1, "expired": 1}
    assert gone.token


def test_a_server_older_than_the_memory_is_refused(run: Run) -> None:
    session = take_over(run)
    file = run.dump()
    for _ in range(3):
        step(run, session)
    session.known.forget(2)
    run.come_back(file)
    with pytest.raises(LostSteps, match="came back at step 0, and the manifest of step 0 is not kept"):
        session.assign(3)


def test_a_wiped_or_swapped_server_stops_the_learner(run: Run, stream: Stream) -> None:
    session = take_over(run)
    memory = session.memory()
    run.come_back({})
    with pytest.raises(ForeignRun, match="wiped or swapped"):
        session.assign(0)
    other = msgspec.json.decode(memory)
    other["nonce"] = "another"
    Run(stream, batch=2, eta=2).join_learner()
    with pytest.raises(ForeignRun, match="of the run with nonce another, the server holds nonce"):
        Session.join(stream, run.rules, memory=msgspec.json.encode(other))


def test_other_settings_need_a_fork(run: Run) -> None:
    session = take_over(run)
    step(run, session)
    step(run, session)
    run.leases("a", 1)
    other = Run(run.stream, batch=3, eta=1).rules
    with pytest.raises(
        SettingsMismatch,
        match=r"^stream.groups_per_step: this run has 2, the learner asks for 3; give .* or .*--fork",
    ):
        Session.join(run.stream, other)
    forked = session.fork(1, "a larger batch", other)
    ledger = run.snapshot()
    assert (forked.lineage, forked.head, ledger.number("batch"), ledger.number("eta")) == (1, 1, 3, 1)
    assert ledger.counts.dropped == {"lineage": 3}
    lease = run.admit("a")
    assert lease.reason == "no-weights", "what the actor served was undone"
    run.applied("a", 1)
    assert run.admit("a").group == "0001-0000000002-00", "undone prompts come first, under the new lineage"


def test_a_recorder_holds_payloads_while_it_lives(run: Run) -> None:
    session = take_over(run)
    joined = run.stream.call(JoinRecorder("bits", "backup"))
    run.queue("a", 2)
    session.assign(0)
    session.commit(1, digest(1), covered=0)
    assert run.snapshot().sizes["payloads"] == 2
    beat = run.stream.call(RecorderBeat("backup", joined.epoch, 0))
    assert (beat.covered, run.snapshot().sizes["payloads"]) == (0, 0)
    run.queue("a", 2)
    session.assign(1)
    run.elapse(7 * 60_000)
    session.beat()
    session.commit(2, digest(2), covered=1)
    assert run.snapshot().sizes["payloads"] == 0, "a recorder that is silent for six leases holds nothing"


def test_a_recorder_that_leaves_holds_nothing(run: Run) -> None:
    session = take_over(run)
    joined = run.stream.call(JoinRecorder("bits", "backup"))
    run.queue("a", 2)
    session.assign(0)
    session.commit(1, digest(1), covered=0)
    run.stream.call(Leave("recorder", "backup", joined.epoch))
    assert run.snapshot().sizes["payloads"] == 0


def test_a_record_holds_what_was_trained_and_survives_forks(run: Run, tmp_path: Path) -> None:
    session, folder = take_over(run), RecordFolder(tmp_path / "record")
    ledger = run.snapshot()
    folder.begin(describe_run(run.stream, ledger.state["nonce"], ledger.state), {"config.json": b"{}"})
    for at in range(3):
        groups = step(run, session)
        folder.add(fetch_step(run.stream, 0, at))
        assert [group.id for group in list(folder.steps())[at].groups()] == groups
    session.fork(1, "test", run.rules)
    run.applied("a", 1)
    again = step(run, session)
    folder.add(fetch_step(run.stream, 1, 1))
    found = list(folder.steps())
    assert [(one.lineage, one.step) for one in found] == [(0, 0), (1, 1)]
    assert ([group.id for group in found[1].groups()], found[1].digest) == (again, digest(2))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path)
    with pytest.raises(StreamError, match="is no record of a run"):
        folder.run()
    (tmp_path / "steps").mkdir()
    path = tmp_path / "steps" / "0000-00000000.step"
    path.write_bytes(b"no frame")
    with pytest.raises(StreamError, match=r"0000-00000000\.step is damaged"):
        list(folder.steps())
    path.rename(tmp_path / "steps" / "0000-00000001.step")
    with pytest.raises(StreamError, match="step 0 is missing"):
        list(folder.steps())
