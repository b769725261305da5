"""A run on a server, read into the same structure that `model.py` predicts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from buffer.batches import Manifest
from buffer.ledger import Snapshot, violations
from tests.contract.harness import Run
from tests.contract.model import Model
from tests.contract.rows import GONE, PAYLOAD, HeldLease, Row, Work

_RULES = (
    "batch",
    "eta",
    "max_steps",
    "attempts_max",
    "lease_ms",
    "cap",
    "dynamic",
    "uncovered_max",
    "bytes_limit",
)
_PLACE = ("lineage", "head", "version", "clock", "tail", "data_end", "checkpoint", "wanted", "covered")
_PACE = ("step_ms", "fleet_ms", "live", "p99_ms", "unsafe_since", "unsafe_ms", "assigned_at")
_HASHES = ("leased", "groups", "manifests", "versions", "work", "skip")


def read_model(run: Run, *, came_back_older: bool = False) -> Model:
    """The state of the run, and proof that nothing in it contradicts itself.

    Of a server that came back older, payloads may be missing.
    """
    with run.stream.redis.pipeline() as pipe:
        pipe.execute_command(*Snapshot(full=True).command(run.stream.run))
        for name in _HASHES:
            pipe.hgetall(run.stream.key(name))
        pipe.zrange(run.stream.key("leases"), 0, -1, withscores=True)
        pipe.lrange(run.stream.key("prompts"), 0, -1).lrange(run.stream.key("times"), 0, -1)
        pipe.xrange(run.stream.key("stream"))
        raw, *hashes, expiry, prompts, times, stream = pipe.execute()
    ledger = Snapshot.answer(raw)
    assert violations(ledger) == []
    leased, groups, manifests, versions, work, skip = [_decoded(found) for found in hashes]
    rows = {group: _row(msgspec.json.decode(value)) for group, value in groups.items()}
    kept = {int(step): msgspec.json.decode(value, type=Manifest) for step, value in manifests.items()}
    model = Model(
        **{name: ledger.number(name) for name in (*_RULES, *_PLACE, *_PACE)},
        policy=ledger.state["policy"],
        admitted=ledger.counts.admitted,
        dead=sum(ledger.counts.dead.values()),
        times=[int(ms) for ms in times],
        prompts=[tuple(map(int, row.split())) for row in prompts],
        skip={int(position): int(attempt) for position, attempt in skip.items()},
        leases={token: _lease(token, msgspec.json.decode(value)) for token, value in leased.items()},
        expiry={token.decode(): int(score) for token, score in expiry},
        ready={group: rows[group] for group in ledger.ready},
        manifests={step: _groups(manifest, rows) for step, manifest in kept.items()},
        strikes={step: dict(manifest.strikes) for step, manifest in kept.items()},
        dropped=Counter(ledger.counts.dropped),
        refused=Counter(ledger.counts.refused),
        trained=Counter(ledger.staleness),
        versions={int(version): digest.decode() for version, digest in versions.items()},
        serving={name: record.version for name, record in ledger.actors.items()},
        beats={name: record.beat for name, record in ledger.actors.items()},
        work={actor: _work(value) for actor, value in work.items() if actor in ledger.actors},
    )
    entries = {msgspec.json.decode(value)["entry"] for value in groups.values()}
    payloads = {entry.decode() for entry, _ in stream}
    assert payloads <= entries, "orphans"
    assert came_back_older or payloads == entries, "lost payloads"
    assert ledger.number("bytes_held") == len(PAYLOAD) * model.payloads()
    assert ledger.sizes["leases"] == len(model.leases) == len(model.expiry)
    counts = ledger.counts
    assert counts.assigned == sum(len(model.assigned(step)) for step in kept if step >= model.version)
    assert (counts.trained, len(groups)) == (sum(ledger.staleness.values()), model.payloads())
    return model


def nothing_assigned_comes_again(model: Model, known: dict[int, Manifest]) -> None:
    """No group of the manifests is outstanding, no prompt of a trained one is queued."""
    assigned = {row.group for manifest in known.values() for row in manifest.rows}
    assert not assigned & ({lease.group for lease in model.leases.values()} | set(model.ready))
    groups = [row.group for manifest in known.values() for row in manifest.groups()]
    trained = {(int(group[:4]), int(group[5:15])) for group in groups}
    assert not {(model.lineage, position) for position, _, _ in model.prompts} & trained


def _decoded(found: dict[bytes, bytes]) -> dict[str, bytes]:
    return {name.decode(): value for name, value in found.items()}


def _row(raw: dict[str, Any]) -> Row:
    return Row(
        *(raw[name] for name in ("position", "attempt", "limit", "deadline", "version_min", "strikes"))
    )


def _groups(manifest: Manifest, rows: dict[str, Row]) -> dict[str, Row]:
    return {row.group: GONE if row.group in manifest.strikes else rows[row.group] for row in manifest.rows}


def _lease(token: str, raw: dict[str, Any]) -> HeldLease:
    names = ("group", "position", "attempt", "limit", "actor", "version", "deadline", "born")
    return HeldLease(
        token, *(raw[name] for name in names), raw.get("probe", False), raw.get("suspect", False)
    )


class _PackedWork(msgspec.Struct):
    times: list[int]
    held: dict[str, int] | list[int]
    """An empty table of Lua is an array."""
    probe: int


def _work(packed: bytes) -> Work:
    raw = msgspec.msgpack.decode(packed, type=_PackedWork)
    return Work(raw.times, dict(raw.held), raw.probe)
