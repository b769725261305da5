"""`launch verify --weights`: an engine is believed only if it scores recent samples as their record says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from buffer.client import Stream
from launch import weights
from launch.weights import TOLERANCE, EngineCheck, check_weights, render
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
        (found,) = check_weights(run.stream, 3)
    return found


def test_an_engine_that_scores_as_the_record_says_is_right(run: Run) -> None:
    found = check(run)
    assert (found.problem, found.tokens) == ("", 12), "three samples of four tokens"
    assert found.max_difference < 1e-6
    assert f"a: 0:{digest(0)}, 12 tokens scored again" in render([found])


def test_an_engine_with_other_weights_under_the_right_label_is_found_out(run: Run) -> None:
    found = check(run, off=2 * TOLERANCE)
    assert "it serves other weights" in found.problem
    assert "VIOLATED" in render([found])


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
