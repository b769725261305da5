"""Row 11: replies are lost, to every call of every process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.proxy import Proxy
from tests.faults.server import Server
from tests.faults.trial import Trial


@pytest.mark.parametrize(("share", "steps"), [(0.05, 25), pytest.param(0.01, 500, marks=pytest.mark.faults)])
def test_row_11_replies_are_lost(
    shared_server: Server, trial: Callable[..., Trial], share: float, steps: int
) -> None:
    """No lease or group is lost or doubled: nothing expires, and each of a step's groups is trained."""
    run = trial(eta=0, batch=3, max_steps=steps, lease_s=20.0)
    with Proxy(shared_server.port, seed=11) as proxy:
        url = shared_server.url_at(proxy.port)
        proxy.lose, proxy.words = share, {b"_publish": 5 * share, b"_admit": 2 * share}
        learner = run.learner(url=url)
        run.actor(url=url), run.actor(url=url)
        learner.wait(0, seconds=60 + steps)
        run.finish()
        assert proxy.lost > steps * share
    ledger = run.ledger()
    assert ledger.number("version") == steps
    assert ledger.counts.trained == 3 * steps
    # A reply that is lost can make its group late, which is then not wanted any more.
    assert set(ledger.counts.dropped) <= {"slow"}, ledger.counts
    # A publish that is repeated is told what it was told before, but for a group whose record is gone by then.
    assert set(ledger.counts.refused) <= {"unknown"}, ledger.counts
