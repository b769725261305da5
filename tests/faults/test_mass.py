"""Point 5: producers, consumers and the server are killed at random, many times over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from tests.faults.server import Server
from tests.faults.trial import Process, Trial

ACTORS = ("a", "b", "c")


@pytest.mark.parametrize(("clients", "servers"), [(8, 2), pytest.param(200, 50, marks=pytest.mark.faults)])
def test_mass_kills(
    own_server: Callable[..., Server], trial: Callable[..., Trial], clients: int, servers: int
) -> None:
    """Acknowledged lost 0, trained twice 0, bound violations 0; a step within 20 s of every fourth kill."""
    draw, server = random.Random(clients), own_server(appendfsync="always")
    run = trial(server, eta=2, batch=3)
    alive: dict[str, Process] = {name: run.actor(name) for name in ACTORS}
    alive["learner"] = run.learner(step_s=0.01)
    run.wait_steps(3)
    plan = ["client"] * clients + ["server"] * servers
    draw.shuffle(plan)
    for number, kind in enumerate(plan):
        time.sleep(draw.uniform(0.0, 0.3))
        if kind == "server":
            server.kill()
            time.sleep(draw.uniform(0.0, 0.2))
            server.start()
        else:
            name = draw.choice([*ACTORS, "learner"])
            alive[name].kill()
            alive[name] = run.learner(step_s=0.01) if name == "learner" else run.actor(name)
        if number % 4 == 3:
            run.wait_more(1, seconds=20)
    run.wait_more(3, seconds=20)
    ledger = run.finish()
    assert ledger.counts.rollbacks == 0
