"""Servers and trials for fault tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faults.real import RealTrial, make_files
from tests.faults.server import Server
from tests.faults.spawner import Spawner
from tests.faults.trial import Trial


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    """What starts the scripted processes."""
    with Spawner(Path(__file__).parents[2]) as started:
        yield started


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that no test hurts."""
    with Server(tmp_path_factory.mktemp("shared-redis")) as server:
        yield server


@pytest.fixture
def trial(
    shared_server: Server, spawner: Spawner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Trial]]:
    """Makes trials, on the shared server unless another is given; their processes end with the test."""
    with ExitStack() as open_trials:

        def make(server: Server | None = None, **settings: Any) -> Trial:
            folder = tmp_path_factory.mktemp("trial")
            made = Trial(server or shared_server, spawner, folder, **settings)
            open_trials.callback(made.close)
            return made

        yield make


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers for this test alone."""
    with ExitStack() as servers:
        made: list[Server] = []

        def make(**settings: Any) -> Server:
            made.append(servers.enter_context(Server(tmp_path / f"redis-{len(made)}", **settings)))
            return made[-1]

        yield make


@pytest.fixture(scope="session")
def real_spawner() -> Iterator[Spawner]:
    """What starts the real learner, its imports done."""
    with Spawner(Path(__file__).parents[2], real=True) as started:
        yield started


@pytest.fixture(scope="module")
def real_trial_of_module(
    shared_server: Server, real_spawner: Spawner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., RealTrial]]:
    """Makes trials with the real learner; their processes end with the module."""
    files = make_files(tmp_path_factory.mktemp("real"))
    with ExitStack() as open_trials:

        def make(server: Server | None = None, **settings: Any) -> RealTrial:
            folder = tmp_path_factory.mktemp("trial")
            made = RealTrial(files, server or shared_server, real_spawner, folder, **settings)
            open_trials.callback(made.close)
            return made

        yield make


@pytest.fixture
def real_trial(real_trial_of_module: Callable[..., RealTrial]) -> Iterator[Callable[..., RealTrial]]:
    """The same; their processes end with the test."""
    with ExitStack() as open_trials:

        def make(server: Server | None = None, **settings: Any) -> RealTrial:
            made = real_trial_of_module(server, **settings)
            open_trials.callback(made.end)
            return made

        yield make
