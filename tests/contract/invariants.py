"""What holds at every instant of a run."""

from __future__ import annotations

import msgspec

from buffer.ledger import Snapshot
from tests.contract.harness import Run
from tests.contract.model import Model


def check(run: Run, model: Model) -> None:
    """The server's state equals the model's, and the invariants hold on the server's own figures."""
    with run.stream.redis.pipeline() as pipe:
        pipe.execute_command(*Snapshot().command(run.stream.run))
        pipe.hvals(run.stream.key("leased")).zrange(run.stream.key("ready"), 0, -1, withscores=True)
        snapshot, leased, ready = pipe.execute()
    ledger = Snapshot.answer(snapshot)
    counts = msgspec.to_builtins(ledger.counts)
    assert ledger.counts.conserved, counts
    assert counts.pop("dropped") == dict(model.dropped)
    assert counts.pop("refused") == dict(model.refused)
    assert counts == model.counts()
    assert max(ledger.staleness, default=0) <= model.eta
    assert ledger.staleness == model.staleness()
    assert (ledger.number("head"), ledger.number("version")) == (model.head, model.version)
    assert (ledger.number("tail"), ledger.number("clock")) == (model.tail, model.clock)
    due = [msgspec.json.decode(raw)["deadline"] for raw in leased] + [int(score) for _, score in ready]
    assert ledger.outstanding == {deadline: due.count(deadline) for deadline in due}
    assert sorted(due) == sorted(model.deadlines())
    assert ledger.sizes["payloads"] == model.payloads()
    assert ledger.sizes["leases"] == len(leased) == ledger.counts.leased
    assert ledger.sizes["ready"] == ledger.counts.queued
    assert (ledger.sizes["prompts"], ledger.sizes["dead"]) == (len(model.prompts), model.dead)
    assert {name: record.version for name, record in ledger.actors.items()} == model.serving
