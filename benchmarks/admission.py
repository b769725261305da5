"""Admissions a second on one server, with 1, 100 and 10,000 actors.

    python -m benchmarks.admission [--actors 1 100 10000] [--json] [--quick]

Actors, taken in turn, ask for leases over four connections, 64 leases open at any time; each lease is granted
and ended again (`filtered`, as dynamic sampling does), so the rate is that of whole cycles of a lease,
feeding the prompts included. Beside it stands what a call costs the server (`INFO commandstats`), also of
the calls of a full step: publish, assign, commit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

from benchmarks.harness import parser, progress, report, server, table
from buffer.admission import Admit, Drop, Lease
from buffer.client import Call, Stream
from buffer.local_server import LocalServer
from buffer.members import Applied, JoinActor
from tests.contract.harness import Run, digest

CONNECTIONS, IN_FLIGHT = 4, 64
BATCH = IN_FLIGHT // 2
"""With eta = 1 two batches of leases may be open."""
AIM = 5_000
"""Admissions a second."""


def pipelined(stream: Stream, calls: Iterable[Call[Any]]) -> list[Any]:
    """The answers to many calls, sent at once."""
    made = list(calls)
    with stream.redis.pipeline(transaction=False) as pipe:
        for call in made:
            pipe.execute_command(*call.command(stream.run))
        return [call.answer(raw) for call, raw in zip(made, pipe.execute(), strict=True)]


class Crowd:
    """A run with many actors, all of them serving version 0."""

    def __init__(self, local: LocalServer, name: str, actors: int) -> None:
        self.streams = [Stream.connect(local.socket_url, name) for _ in range(CONNECTIONS)]
        self.streams[0].load_library()
        self.run = Run(self.streams[0], batch=BATCH, eta=1, max_steps=1 << 30, dynamic=1).start(prompts=0)
        self.names = [f"actor-{number}" for number in range(actors)]
        joins = pipelined(self.streams[0], (JoinActor(f"{name:0>32}", name, "host") for name in self.names))
        self.run.epochs.update({name: join.epoch for name, join in zip(self.names, joins, strict=True)})
        self.apply(0, self.names)
        self.turn: Iterator[str] = cycle(self.names)
        self.fed = 0

    def apply(self, version: int, names: Iterable[str]) -> None:
        """Says that actors serve a version."""
        calls = (Applied(name, self.run.epochs[name], version, digest(version)) for name in names)
        pipelined(self.streams[0], calls)

    def feed(self, prompts: int) -> None:
        """Feeds so many prompts."""
        self.run.feed(self.fed, prompts)
        self.fed += prompts

    def spread(self, pool: ThreadPoolExecutor, calls: Sequence[Admit] | Sequence[Drop]) -> list[Any]:
        """The answers to calls made over all connections at once; an actor keeps to one connection."""
        homes = [int(call.actor.partition("-")[2]) % CONNECTIONS for call in calls]
        shares = [
            [call for call, home in zip(calls, homes, strict=True) if home == own]
            for own in range(CONNECTIONS)
        ]
        parts = [iter(part) for part in pool.map(pipelined, self.streams, shares)]
        return [next(parts[home]) for home in homes]

    def admits(self) -> list[Admit]:
        """Calls for as many leases as may be open, by the actors whose turn it is."""
        return [self.run.next_admit(name) for name in islice(self.turn, IN_FLIGHT)]

    def drops(self, calls: list[Admit], leases: list[Lease]) -> list[Drop]:
        """Calls that end these leases, each by its actor."""
        pairs = zip(calls, leases, strict=True)
        return [Drop(call.actor, call.epoch, lease.token, "filtered") for call, lease in pairs]

    def close(self) -> None:
        """Closes the connections."""
        for stream in self.streams:
            stream.close()


def cost(stream: Stream) -> float:
    """Microseconds of server time of a function call since the last reset, which this is."""
    stats: Any = stream.redis.info("commandstats")
    stream.redis.config_resetstat()
    return float(stats.get("cmdstat_fcall", {}).get("usec_per_call", 0.0))


def rate(crowd: Crowd, rounds: int) -> dict[str, float]:
    """Cycles a second over some rounds, and what admit and drop cost, over as many again."""
    stream = crowd.streams[0]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        start = time.perf_counter()
        for _ in range(rounds):
            crowd.feed(IN_FLIGHT)
            calls = crowd.admits()
            leases = crowd.spread(pool, calls)
            granted = [lease.status for lease in leases].count("lease")
            if granted != IN_FLIGHT:
                raise SystemExit(f"{granted} of {IN_FLIGHT} leases granted: {leases[0].reason}")
            crowd.spread(pool, crowd.drops(calls, leases))
        seconds = time.perf_counter() - start
        admit, drop = [], []
        for _ in range(rounds):
            crowd.feed(IN_FLIGHT)
            cost(stream)
            calls = crowd.admits()
            leases = crowd.spread(pool, calls)
            admit.append(cost(stream))
            crowd.spread(pool, crowd.drops(calls, leases))
            drop.append(cost(stream))
    usec = {"admit_us": min(admit), "drop_us": min(drop)}
    return {"admissions_per_s": rounds * IN_FLIGHT / seconds, **usec}


def step_costs(crowd: Crowd, rounds: int) -> dict[str, float]:
    """What the calls of a full step cost the server, in microseconds a call."""
    stream, run, names = crowd.streams[0], crowd.run, crowd.names[:IN_FLIGHT]
    costs: dict[str, list[float]] = {"publish_us": [], "assign_us": [], "commit_us": []}
    for step in range(rounds):
        crowd.feed(BATCH)
        owners = list(islice(cycle(names), BATCH))
        leases = [run.admit(name) for name in owners]
        cost(stream)
        for name, lease in zip(owners, leases, strict=True):
            run.publish(lease, name)
        costs["publish_us"].append(cost(stream))
        run.assign(step)
        costs["assign_us"].append(cost(stream))
        run.commit(step + 1, covered=step)
        costs["commit_us"].append(cost(stream))
        crowd.apply(step + 1, names)
    return {name: min(values) for name, values in costs.items()}


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    options = parser(__doc__ or "")
    options.add_argument("--actors", type=int, nargs="+", default=[1, 100, 10_000])
    options.add_argument("--appendfsync", choices=["always", "everysec"], default="always")
    chosen = options.parse_args(arguments)
    if chosen.quick:
        chosen.actors = [1, 50]
    result: dict[str, Any] = {"appendfsync": chosen.appendfsync, "aim_per_s": AIM, "actors": {}}
    with server(chosen.appendfsync) as local:
        for actors in chosen.actors:
            progress(f"{actors} actors join")
            crowd = Crowd(local, f"bench-{actors}", actors)
            progress(f"{actors} actors ask for leases")
            figures = rate(crowd, 3 if chosen.quick else 60)
            result["actors"][str(actors)] = {**figures, **step_costs(crowd, 3 if chosen.quick else 12)}
            crowd.close()
    rows = [[actors, *figures.values()] for actors, figures in result["actors"].items()]
    headings = ["actors", "admissions/s", *(f"{call}, us" for call in ("admit", "drop", "publish"))]
    report(result, table([*headings, "assign, us", "commit, us"], rows), chosen)


if __name__ == "__main__":
    main(sys.argv[1:])
