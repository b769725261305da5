"""Row 16: whoever holds a version is killed, or stopped, at every chunk of a push."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.faults.holder import Ready
from tests.unit.weightsync.versions import holding, version
from weightsync.errors import SourceError
from weightsync.staging import Staging
from weightsync.transports.peer import Peer
from weightsync.transports.shm import Shm

CHUNKS = 7
TIMEOUT_S = 2.0
"""Longer than a busy machine keeps a holder that is well from answering."""

Holders = dict[tuple[int, str], Ready]


@pytest.fixture(scope="module")
def holders() -> Iterator[Holders]:
    """Processes that each hold version 4 and die at one chunk."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.holder", "4", str(CHUNKS)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    found = [msgspec.json.decode(process.stdout.readline(), type=Ready) for _ in range(2 * CHUNKS)]
    yield {(one.chunk, one.action): one for one in found}
    process.communicate()
    assert process.returncode == 0


def go_on() -> None:
    """Nobody wants another version."""


@pytest.mark.parametrize(
    ("chunk", "action"), [*((chunk, "kill") for chunk in range(CHUNKS)), (0, "stop"), (3, "stop")]
)
def test_row_16_the_source_dies_at_a_chunk(holders: Holders, chunk: int, action: str) -> None:
    """What was verified stays, nothing is whole before all is here, and another source gives the rest."""
    image, manifest = version(4)
    staging = Staging(manifest, None, go_on)
    (source,) = [one for one in holders[chunk, action].sources if one.kind == "peer"]
    began = time.monotonic()
    with pytest.raises(SourceError, match="its holder is gone or slow"):
        Peer(TIMEOUT_S, 1).fetch(source, manifest.label, staging)
    assert time.monotonic() - began < 5 * TIMEOUT_S, "a stopped holder holds nobody longer than the timeout"
    assert staging.missing() == list(range(chunk, CHUNKS))
    with pytest.raises(AssertionError):
        staging.finish()
    with holding(image, manifest) as (holder, _):
        Peer(30).fetch(holder.sources(manifest.label)[-1], manifest.label, staging)
        assert holder.served_bytes == sum(one.size for one in manifest.chunks[chunk:])
        assert bytes(staging.finish().readable()) == bytes(image.readable())


def test_shared_memory_stays_when_its_holder_is_killed(holders: Holders) -> None:
    """Who has opened it keeps it; who comes later is told."""
    image, manifest = version(4)
    victim = holders[CHUNKS - 1, "stop"]
    source = next(one for one in victim.sources if one.kind == "shm")
    first, second = Staging(manifest, None, go_on), Staging(manifest, None, go_on)
    Shm().fetch(source, manifest.label, first)
    os.kill(victim.pid, signal.SIGKILL)
    stat = Path(f"/proc/{victim.pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert bytes(first.finish().readable()) == bytes(image.readable())
    with pytest.raises(SourceError, match="its process is gone"):
        Shm().fetch(source, manifest.label, second)
