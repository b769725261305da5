"""The evaluator beside a run: which versions it takes, which it skips, what it leaves in Redis."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.config import Sampling
from actors.errors import EngineError
from actors.evaluation import Asked, figures
from buffer.client import Stream
from launch.evaluation import Evaluation
from launch.evaluator import Evaluator
from launch.status import read_status, render
from learner.kept import Kept, kept_versions, read_kept
from tests.contract.harness import Run, digest


class Training:
    """A run whose kept versions a test writes, and an evaluator whose evaluations it scripts."""

    def __init__(self, stream: Stream, folder: Path) -> None:
        self.run, self.folder, self.weights = Run(stream, batch=1), folder, folder / "weights"
        self.run.start("a")
        self.evaluated: list[tuple[int, list[int]]] = []
        self.meanwhile: dict[int, Callable[[Path], None]] = {0: lambda path: None}
        """What happens while a version is evaluated."""
        self.evaluator = Evaluator(stream, folder, 10, self._evaluate)

    def keep(self, *versions: int, made: str = "", lineage: int = 0) -> None:
        """Versions on disk, committed in Redis with their usual digest; `made`: they have another one."""
        for version in versions:
            folder = self.weights / str(version)
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_text(f"weights of {version}")
            label = Kept(version, made or digest(version), lineage)
            (folder / "version.json").write_bytes(msgspec.json.encode(label))
            key = self.run.stream.key("versions")
            self.run.stream.redis.hset(key, str(version), digest(version))

    def end(self) -> None:
        self.run.leave_learner("done")

    def look(self) -> None:
        """Lets the evaluator work until the run is over, which it is by then."""
        self.end()
        self.evaluator.run(lambda: False)

    def lines(self) -> list[dict[str, Any]]:
        path = self.folder / "evaluations.jsonl"
        return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]

    def _evaluate(self, path: Path, skipped: list[int]) -> Evaluation:
        kept = read_kept(path)
        assert kept is not None
        self.evaluated.append((kept.version, skipped))
        assert len(self.evaluated) < 10, "it goes on and on"
        self.meanwhile.get(kept.version, self.meanwhile[0])(path)
        assert (path / "model.safetensors").read_text() == f"weights of {kept.version}"
        found = figures([Asked(0, 1, [1.0, 0.0], [3, 4], 0, {})], 2)
        return Evaluation(
            **msgspec.structs.asdict(found),
            model=str(path),
            version=kept.version,
            digest=kept.digest,
            lineage=kept.lineage,
            data="held_out.jsonl",
            threshold=1.0,
            sampling=Sampling(),
            seed=0,
            skipped=skipped,
            time=1.0,
            seconds=2.0,
        )


@pytest.fixture
def training(stream: Stream, tmp_path: Path) -> Training:
    return Training(stream, tmp_path)


def test_the_newest_version_that_is_due_is_evaluated_once(training: Training) -> None:
    training.keep(0, 9, 10, 11)
    training.look()
    training.evaluator.run(lambda: False)
    assert training.evaluated == [(10, [0])]
    assert [line["version"] for line in training.lines()] == [10]


def test_what_came_while_another_was_evaluated_is_skipped_and_named(
    training: Training, capfd: pytest.CaptureFixture[str]
) -> None:
    training.keep(0)
    training.meanwhile[10] = lambda path: training.keep(20, 30, 40)
    first = iter((False, True))
    training.evaluator.run(lambda: next(first))
    training.keep(10)
    training.look()
    assert training.evaluated == [(0, []), (10, []), (40, [20, 30])]
    assert "skipped, while others were evaluated: versions 20, 30" in capfd.readouterr().err


def test_a_version_may_be_removed_while_it_is_evaluated(training: Training) -> None:
    def remove(path: Path) -> None:
        for name in os.listdir(training.weights / "10"):
            (training.weights / "10" / name).unlink()
        (training.weights / "10").rmdir()

    training.keep(10)
    training.meanwhile[10] = remove
    training.look()
    assert [line["version"] for line in training.lines()] == [10]
    assert not (training.folder / "evaluating").exists()


def test_a_version_that_is_not_the_committed_one_is_left_alone(training: Training) -> None:
    training.keep(0)
    training.keep(10, made="of a lineage that was undone")
    training.look()
    assert training.evaluated == [(0, [])]


def test_after_a_fork_a_version_of_other_weights_is_evaluated_again(training: Training) -> None:
    training.keep(10)
    training.look()
    (training.weights / "10" / "version.json").write_bytes(msgspec.json.encode(Kept(10, "again", 1)))
    training.run.stream.redis.hset(training.run.stream.key("versions"), "10", "again")
    training.evaluator.run(lambda: False)
    assert [(line["digest"], line["lineage"]) for line in training.lines()] == [
        (digest(10), 0),
        ("again", 1),
    ]


def test_an_engine_that_fails_costs_one_version(
    training: Training, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> None:
        raise EngineError("no memory")

    training.keep(10)
    training.meanwhile[10] = fail
    training.look()
    assert training.evaluated == [(10, [0])]
    assert "version 10 is not evaluated: no memory" in capfd.readouterr().err
    training.keep(20)
    training.evaluator.run(lambda: False)
    assert training.evaluated[1:] == [(20, [0, 10])]


def test_status_shows_the_newest(training: Training) -> None:
    stream = training.run.stream
    assert read_status(stream).evaluation is None
    training.keep(10)
    training.look()
    found = read_status(stream).evaluation
    assert found is not None
    assert (found.version, found.samples, found.mean_at_k, found.pass_at_k) == (10, 2, 0.5, {1: 0.5, 2: 1.0})
    assert "evaluated  version 10: mean@2 0.500, pass@2 1.000; skipped 0" in render(read_status(stream))
    assert stream.redis.hget(stream.key("evaluations"), "mean_at_k") == b"0.5"


def test_folders_without_a_label_are_no_versions(training: Training) -> None:
    training.keep(0)
    (training.weights / "20").mkdir()
    (training.weights / ".30.part").mkdir()
    assert list(kept_versions(training.weights)) == [0]
