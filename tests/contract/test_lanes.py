"""The stock transport's lanes: each live actor is sent the newest version, whatever its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from buffer.client import Stream
from buffer.members import Heartbeat
from tests.contract.harness import Run
from tests.waiting import wait_until
from weightsync import lanes as module
from weightsync.errors import WeightSyncError
from weightsync.lanes import Lanes
from weightsync.manifest import Manifest
from weightsync.protocol import JoinGroup, Receive, Request, decode_request

WEIGHTS = {"w": torch.zeros(2)}


class Group:
    """Stands for the meeting with an engine, which takes what it is sent until it has had enough."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def open(cls, name: str, *, invite: Callable[[int], None], **_: object) -> Group:
        invite(1234)
        return cls(name)

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if "bad" in tensors:
            raise WeightSyncError("the engine is gone")

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def run(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with a live actor whose engine is up."""
    monkeypatch.setattr(module, "StockGroup", Group)
    run = Run(stream).start("a")
    stream.call(Heartbeat("a", run.epochs["a"], "running", "{}", ()))
    return run


@pytest.fixture
def said() -> list[str]:
    """What the lanes log."""
    return []


@pytest.fixture
def lanes(run: Run, said: list[str]) -> Iterator[Lanes]:
    with Lanes(run.stream, learner_epoch=1, address="127.0.0.1", timeout_s=5, log=said.append) as lanes:
        yield lanes


def asked(run: Run) -> Request:
    """The actor's next mail."""
    mail = run.stream.take(run.stream.key("mail:a"), 10)
    assert mail is not None
    return decode_request(mail)


def test_after_a_fork_the_lower_version_is_sent(run: Run, lanes: Lanes) -> None:
    lanes.publish(Manifest.of(7, WEIGHTS), WEIGHTS)
    assert isinstance(asked(run), JoinGroup)
    for version in (7, 3, 4):
        if version != 7:
            lanes.publish(Manifest.of(version, WEIGHTS), WEIGHTS)
        request = asked(run)
        assert isinstance(request, Receive)
        assert request.manifest.version == version
    wait_until(lambda: lanes.push_seconds().keys() == {"a"}, 10, "the push is over")


def test_an_engine_that_is_gone_is_named_with_the_version_it_stands_at(
    run: Run, lanes: Lanes, said: list[str]
) -> None:
    lanes.publish(Manifest.of(2, WEIGHTS), WEIGHTS)
    assert isinstance(asked(run), JoinGroup)
    assert isinstance(asked(run), Receive)
    bad = {"bad": torch.zeros(1)}
    lanes.publish(Manifest.of(3, bad), bad)
    wait_until(lambda: said, 10, "it is said")
    assert said == ["weights: a is left behind at version 2: the engine is gone"]
