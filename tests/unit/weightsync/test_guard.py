"""A slot is read or written, never both; a death ends either; what it holds is what was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from weightsync.errors import SourceError
from weightsync.guard import Contents, Guard, lease

SEVEN = Contents("7:aa", "card", b"handle", 12)
EIGHT = Contents("8:bb", "card", b"handle", 12)
READER = """
import sys, time
from weightsync.guard import lease
with lease(sys.argv[1], "7:aa") as held:
    print(held.contents.size, flush=True)
    time.sleep(60)
"""
OWNER = """
import time
from weightsync.guard import Contents, Guard
guard = Guard()
with guard.writing(1) as put:
    put(Contents("7:aa", "card", b"handle", 12))
print(guard.path, flush=True)
time.sleep(60)
"""


def end(other: subprocess.Popen[str]) -> None:
    assert other.stdout is not None
    other.kill()
    other.wait()
    other.stdout.close()


@pytest.fixture
def guard() -> Iterator[Guard]:
    made = Guard()
    with made.writing(1.0) as put:
        put(SEVEN)
    yield made
    made.close()


def process(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def said(other: subprocess.Popen[str]) -> str:
    assert other.stdout is not None
    return other.stdout.readline().strip()


def test_many_read_and_what_they_read_is_named(guard: Guard) -> None:
    with lease(guard.path, "7:aa") as one, lease(guard.path, "7:aa") as other:
        assert one.contents == other.contents == SEVEN
        one.check()
    with pytest.raises(SourceError, match="holds 7:aa, expected 8:bb"), lease(guard.path, "8:bb"):
        pytest.fail("it holds another version")


def test_nothing_is_written_while_somebody_reads(guard: Guard) -> None:
    with lease(guard.path, "7:aa"):
        with pytest.raises(SourceError, match="still being read"), guard.writing(0.05):
            pytest.fail("somebody reads")
        with lease(guard.path, "7:aa") as other:
            assert other.contents == SEVEN, "it is as it was"
    with guard.writing(0.0) as put:
        put(EIGHT)
    with lease(guard.path, "8:bb") as held:
        assert held.contents == EIGHT


def test_a_writer_waits_for_those_that_read(guard: Guard) -> None:
    left = threading.Event()

    def read() -> None:
        with lease(guard.path, "7:aa"):
            begun.set()
            time.sleep(0.1)
            left.set()

    begun, reader = threading.Event(), threading.Thread(target=read)
    reader.start()
    assert begun.wait(5)
    with guard.writing(5.0):
        assert left.is_set()
    reader.join()


def test_nobody_reads_what_is_being_written_or_what_failed(guard: Guard) -> None:
    def write() -> None:
        with guard.writing(1.0), pytest.raises(SourceError, match="being written"), lease(guard.path, "7:aa"):
            pytest.fail("it is being written")
        with guard.writing(1.0) as put:
            put(EIGHT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    with pytest.raises(SourceError, match="holds nothing"), lease(guard.path, "8:bb"):
        pytest.fail("the writing failed")


def test_a_reader_that_is_killed_leaves_the_slot(guard: Guard) -> None:
    reader = process(READER, guard.path)
    assert said(reader) == "12"
    with pytest.raises(SourceError, match="still being read"), guard.writing(0.05):
        pytest.fail("somebody reads")
    end(reader)
    with guard.writing(5.0) as put:
        put(EIGHT)


def test_an_owner_that_is_killed_is_noticed_by_who_reads() -> None:
    owner = process(OWNER)
    path = said(owner)
    with lease(path, "7:aa") as held:
        held.check()
        end(owner)
        with pytest.raises(SourceError, match="ended while it was read"):
            held.check()
    with pytest.raises(SourceError, match="its process is gone"), lease(path, "7:aa"):
        pytest.fail("the owner is gone")


def test_another_file_at_the_same_path_is_not_its_owner() -> None:
    """Process ids and descriptors are used again."""
    one = Guard()
    with one.writing(1.0) as put:
        put(SEVEN)
    path, descriptor = one.path, int(one.path.rpartition("/")[2])
    with lease(path, "7:aa") as held:
        other = Guard()
        os.dup2(int(other.path.rpartition("/")[2]), descriptor)
        with pytest.raises(SourceError, match="ended while it was read"):
            held.check()
        other.close()
    one.close()


def test_what_is_no_slot_is_refused(guard: Guard) -> None:
    descriptor = int(guard.path.rpartition("/")[2])
    os.pwrite(descriptor, b"\xc1", 0)
    with pytest.raises(SourceError, match="no slot of this release"), lease(guard.path, "7:aa"):
        pytest.fail("it is damaged")
