"""Fixtures every suite shares: a private Redis, a fresh run on it, data files, hypothesis profiles."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from buffer.client import Stream
from buffer.local_server import LocalServer

pytest.register_assert_rewrite("tests.contract.walk", "tests.contract.reading")

# A shared machine makes any per-example deadline flaky; `--hypothesis-profile thorough` searches longer.
_SLOW = [HealthCheck.too_slow]
settings.register_profile("quick", deadline=None, max_examples=60, suppress_health_check=_SLOW)
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=_SLOW)
settings.load_profile("quick")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A private server for the whole session; every test takes a run name of its own on it."""
    with LocalServer.start(tmp_path_factory.mktemp("redis"), appendfsync="everysec") as server:
        yield server


@pytest.fixture
def run_name() -> str:
    """A run name no other test uses."""
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def stream(redis_server: LocalServer, run_name: str) -> Iterator[Stream]:
    """A connection to a fresh run, with the function library loaded."""
    connected = Stream.connect(redis_server.socket_url, run_name, patience_s=5.0)
    connected.load_library()
    yield connected
    connected.close()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data files that the environment variable SLIPSTREAM_TEST_DATA names."""
    folder = os.environ.get("SLIPSTREAM_TEST_DATA", "")
    if not folder:
        pytest.skip("SLIPSTREAM_TEST_DATA names no folder of real data files")
    return Path(folder)
