"""`launch verify --weights`: engines and kept versions must score recent samples as their record says."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffer.client import Stream
from launch import weights
from launch.weights import (
    ROUNDED,
    TOLERANCE,
    EngineCheck,
    VersionCheck,
    WeightChecks,
    check_weights,
    render,
)
from learner.kept import Kept
from tests.contract.harness import Run, digest
from weightsync.protocol import Score, Scores, decode_request


@contextmanager
def engine(stream: Stream, actor: str, label: str, off: float = 0.0, silent: bool = False) -> Iterator[None]:
    """An actor that answers score requests as `make_group` wrote its samples, or a little off."""
    ended = threading.Event()

    def answer() -> None:
        while not ended.is_set():
            mail = stream.take(stream.key(f"mail:{actor}"), 0.1)
            if mail is None or silent:
                continue
            request = decode_request(mail)
            assert isinstance(request, Score)
            scores = [
                [-9.0, -9.0, *[-0.5 - index % 2 + off] * (len(sequence) - 3)]
                for index, sequence in enumerate(request.sequences)
            ]
            reply = msgspec.json.encode(Scores(request.request, label, scores))
            stream.redis.rpush(stream.key(f"scores:{actor}"), reply)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def run(stream: Stream) -> Run:
    """A run with two groups of version 0 in its stream, each of two samples of four tokens."""
    run = Run(stream).start("a")
    run.queue("a", 2)
    run.heartbeat("a")
    return run


def check(run: Run, **how: object) -> EngineCheck:
    label = how.pop("label", f"0:{digest(0)}")
    with engine(run.stream, "a", label, **how):  # type: ignore[arg-type]
        (found,) = check_weights(run.stream, 3).engines
    return found


def test_an_engine_that_scores_as_the_record_says_is_right(run: Run) -> None:
    found = check(run)
    assert (found.problem, found.tokens) == ("", 12), "three samples of four tokens"
    assert found.max_difference < 1e-6
    assert f"a: 0:{digest(0)}, 12 tokens scored again" in render(WeightChecks([found], []))


def test_an_engine_with_other_weights_under_the_right_label_is_found_out(run: Run) -> None:
    found = check(run, off=2 * TOLERANCE)
    assert "it serves other weights" in found.problem
    assert "VIOLATED" in render(WeightChecks([found], []))


def test_a_label_that_was_never_committed_is_found_out(run: Run) -> None:
    found = check(run, label="0:other")
    assert found.problem == f"serves version 0 with digest other, committed is {digest(0)}"


def test_samples_of_other_versions_say_nothing_of_this_one(run: Run) -> None:
    run.stream.redis.hset(run.stream.key("versions"), "1", "new")
    found = check(run, label="1:new", off=5.0)
    assert (found.tokens, found.problem) == (0, "")


def test_an_engine_that_does_not_answer_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PATIENCE_S", 0.3)
    assert "no answer within 0.3 s" in check(run, silent=True).problem


def keep(root: Path, version: int, digest: str) -> None:
    """A folder of a run that says it holds a version."""
    folder = root / str(version)
    folder.mkdir(parents=True)
    (folder / "version.json").write_bytes(msgspec.json.encode(Kept(version, digest, 0)))


@pytest.fixture
def two_versions(stream: Stream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run whose engine serves version 1 now, with samples of version 0 in its stream; in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    run = Run(stream).start("a")
    run.queue("a", 2)
    run.heartbeat("a")
    stream.redis.hset(stream.key("versions"), "1", digest(1))
    return run


def versions_of(
    run: Run, monkeypatch: pytest.MonkeyPatch, off: float
) -> tuple[list[VersionCheck], list[Any]]:
    """What becomes of the samples of version 0, if its weights score `off` the record; what was asked."""
    asked: list[Any] = []

    def rescored(model: dict[str, Any], wanted: list[dict[str, Any]]) -> list[list[list[float]] | None]:
        asked.extend(wanted)
        return [
            [[-9.0, -9.0, *[-0.5 - index % 2 + off] * 4] for index, _ in enumerate(one["sequences"])]
            for one in wanted
        ]

    monkeypatch.setattr(weights, "_rescored", rescored)
    with engine(run.stream, "a", f"1:{digest(1)}"):
        found = check_weights(run.stream, 3)
    assert [(one.tokens, one.problem) for one in found.engines] == [(0, "")]
    return found.versions, asked


def test_what_no_engine_serves_is_scored_under_the_version_that_is_kept(
    two_versions: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(Path("runs", two_versions.stream.run, "weights"), 0, digest(0))
    (found,), (asked,) = versions_of(two_versions, monkeypatch, 0.0)
    assert (found.label, found.tokens, found.kept, found.problem) == (f"0:{digest(0)}", 12, True, "")
    assert Path(asked["folder"]).parts[-3].startswith(two_versions.stream.run), "held, as it may be removed"
    assert list(Path("runs", two_versions.stream.run).iterdir()) == [
        Path("runs", two_versions.stream.run, "weights")
    ]
    assert len(asked["sequences"]) == 3
    (found,), _ = versions_of(two_versions, monkeypatch, 2 * TOLERANCE)
    assert "other weights wrote them" in found.problem
    assert "VIOLATED" in render(WeightChecks([], [found]))
    assert not WeightChecks([], [found]).hold


def test_versions_that_are_not_kept_are_named(two_versions: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another digest is as good as not there."""
    keep(Path("runs", two_versions.stream.run, "weights"), 0, "of-a-twin")
    (found,), asked = versions_of(two_versions, monkeypatch, 5.0)
    assert (found.tokens, found.kept, found.problem, asked) == (12, False, "", [])
    assert f"0:{digest(0)}: 12 tokens of weights not kept" in render(WeightChecks([], [found]))


def test_where_something_computes_in_bf16_the_mean_counts(run: Run) -> None:
    run.stream.redis.set(run.stream.key("config"), b'{"engine": {"dtype": "bfloat16"}}')
    assert check(run, off=ROUNDED / 2).problem == ""
    assert "on average: it serves other weights" in check(run, off=2 * ROUNDED).problem


def test_a_version_that_is_removed_while_engines_score_is_held(
    two_versions: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path("runs", two_versions.stream.run, "weights")
    keep(root, 0, digest(0))
    ask = weights.ask_scores

    def removed_meanwhile(*arguments: Any) -> Scores | None:
        shutil.rmtree(root)
        return ask(*arguments)

    monkeypatch.setattr(weights, "ask_scores", removed_meanwhile)
    (found,), _ = versions_of(two_versions, monkeypatch, 0.0)
    assert found.kept
