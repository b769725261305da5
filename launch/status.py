"""A run as Redis knows it: the figures behind `launch status` and the progress line."""

from __future__ import annotations

from typing import Any

import msgspec
import redis

from buffer.client import Stream
from buffer.connect import connect, shown
from buffer.errors import NoRun
from buffer.keys import RUNS, key
from buffer.ledger import Counts, Ledger, Snapshot
from launch.errors import LaunchError


class GroupCounts(msgspec.Struct, frozen=True):
    """The ledger, in groups."""

    admitted: int
    """Leases ever granted."""
    leased: int
    """Their lease is open."""
    queued: int
    """Published, in no batch yet."""
    assigned: int
    """In a batch whose step is not committed yet."""
    trained: int
    """In a committed step, struck ones apart."""
    dropped: dict[str, int]
    """By reason, such as `expired`; reasons without any are left out."""

    def identity(self, conserved: bool) -> str:
        """The conservation of groups as a line.

        >>> GroupCounts(5, 1, 0, 0, 3, {"expired": 1}).identity(True)
        '5 admitted = 1 leased + 0 queued + 0 assigned + 3 trained + 1 expired dropped'
        """
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "0"
        return (
            f"{self.admitted} admitted = {self.leased} leased + {self.queued} queued + "
            f"{self.assigned} assigned + {self.trained} trained + {dropped} dropped"
            + ("" if conserved else "   NOT CONSERVED")
        )

    @classmethod
    def of(cls, counts: Counts) -> GroupCounts:
        """The part of the ledger that a person looks at."""
        return cls(
            counts.admitted, counts.leased, counts.queued, counts.assigned, counts.trained, counts.dropped
        )


class ActorStatus(msgspec.Struct, frozen=True):
    """An actor of the run."""

    name: str
    """Unique in the run."""
    state: str
    """`starting`, `running`, `draining`, or `silent` without a heartbeat for a lease's length."""
    version: int
    """What its engine serves, -1 for nothing yet."""
    published: int
    """Groups of its that were taken, since its process started."""
    in_flight: int
    """Leases it is working on."""
    silent_s: float
    """Since its last heartbeat, on the run's clock."""
    weights: str
    """What its weight agent is at, such as `serving 12` or `staging 13`; empty before it says so."""
    transport: str
    """How the version it serves came: `shm`, `delta`, `peer`, `disk`, `gloo`; empty for stock."""


class EvaluationStatus(msgspec.Struct, frozen=True):
    """The newest evaluation of the run."""

    version: int
    """The version that answered."""
    samples: int
    """K, answers to each question."""
    mean_at_k: float
    """Share of all answers that passed, 0 to 1."""
    pass_at_k: dict[int, float]
    """k -> probability that one of k answers to a question passes, mean over the questions."""
    skipped: list[int]
    """Versions that were to be evaluated before it, and were not."""

    @classmethod
    def of(cls, figures: dict[bytes, bytes]) -> EvaluationStatus | None:
        """What `{run}:evaluations` says."""
        if not figures:
            return None
        plain = {name.decode(): msgspec.Raw(value) for name, value in figures.items()}
        wanted = {name: plain[name] for name in cls.__struct_fields__}
        return msgspec.json.decode(msgspec.json.encode(wanted), type=cls)

    def line(self) -> str:
        """It in one line.

        >>> EvaluationStatus(40, 8, 0.5, {1: 0.5, 8: 0.75}, [20]).line()
        'version 40: mean@8 0.500, pass@8 0.750; skipped 20'
        """
        skipped = f"; skipped {', '.join(map(str, self.skipped))}" if self.skipped else ""
        best = max(self.pass_at_k)
        return (
            f"version {self.version}: mean@{self.samples} {self.mean_at_k:.3f}, "
            f"pass@{best} {self.pass_at_k[best]:.3f}{skipped}"
        )


class Status(msgspec.Struct, frozen=True):
    """A run at one instant."""

    run: str
    """Name of the run."""
    phase: str
    """`warm-up`, `training`, `stopping`, or why it ended."""
    step: int
    """Optimizer steps done, the newest committed version."""
    max_steps: int
    """Steps after which the run ends."""
    head: int
    """The next step to assign."""
    reward: float | None
    """Mean reward of the newest step's groups."""
    staleness_mean: float | None
    """Over all trained groups, in steps."""
    staleness_max: int | None
    """Of a trained group, in steps; null before the first."""
    max_staleness: int
    """The bound, eta."""
    tokens_per_second: float | None
    """Trained tokens over the time since the first step began; null before a step is done."""
    groups: GroupCounts
    """Where all groups are."""
    conserved: bool
    """Whether admitted = leased + queued + assigned + trained + dropped."""
    actors: list[ActorStatus]
    """By name, those that left apart."""
    evaluation: EvaluationStatus | None = None
    """Of a version, the newest there is; null before the first."""


def read_status(stream: Stream) -> Status:
    """A run's status, from one atomic snapshot, and its evaluation. Raises `NoRun`, `RedisUnavailable`."""
    status = of_ledger(stream.run, stream.call(Snapshot()))
    found: Any = stream.redis.hgetall(stream.key("evaluations"))
    return msgspec.structs.replace(status, evaluation=EvaluationStatus.of(found))


def of_ledger(run: str, ledger: Ledger) -> Status:
    """The status that a snapshot shows."""
    counts = ledger.counts
    trained = sum(ledger.staleness.values())
    weighted = sum(steps * groups for steps, groups in ledger.staleness.items())
    return Status(
        run=run,
        phase=_phase(ledger),
        step=max(ledger.number("version"), 0),
        max_steps=ledger.number("max_steps"),
        head=ledger.number("head"),
        reward=_figure(ledger, "reward_mean"),
        staleness_mean=weighted / trained if trained else None,
        staleness_max=max(ledger.staleness) if trained else None,
        max_staleness=ledger.number("eta"),
        tokens_per_second=_figure(ledger, "tokens_per_second"),
        groups=GroupCounts.of(counts),
        conserved=counts.conserved,
        actors=[_actor(ledger, name) for name in ledger.actors],
    )


def _actor(ledger: Ledger, name: str) -> ActorStatus:
    record = ledger.actors[name]
    return ActorStatus(
        name=name,
        state=record.state if ledger.alive(name) else "silent",
        version=record.version,
        published=int(record.stats.get("published", 0)),
        in_flight=int(record.stats.get("in_flight", 0)),
        silent_s=ledger.silent_s(name),
        weights=str(record.stats.get("weights", "")),
        transport=str(record.stats.get("transport", "")),
    )


def _phase(ledger: Ledger) -> str:
    if ledger.state["ended"]:
        return ledger.state["ended"]
    if ledger.sizes["stopping"]:
        return "stopping"
    return "training" if ledger.number("version") >= 0 else "warm-up"


def _figure(ledger: Ledger, name: str) -> float | None:
    return float(ledger.progress[name]) if name in ledger.progress else None


def render(status: Status) -> str:
    """The status as a page of text."""
    lines = [
        f"run        {status.run}: {status.phase}",
        f"step       {status.step} of {status.max_steps}",
        f"reward     {_shown(status.reward, '.3f')}",
        f"staleness  mean {_shown(status.staleness_mean, '.2f')}, max {_shown(status.staleness_max, 'd')}, "
        f"bound {status.max_staleness}",
        f"groups     {status.groups.identity(status.conserved)}",
        f"tokens/s   {_shown(status.tokens_per_second, '.0f')}",
    ]
    if status.evaluation is not None:
        lines.append(f"evaluated  {status.evaluation.line()}")
    for actor in status.actors:
        lines.append(
            f"{actor.name:<10} {actor.state}, version {actor.version}, {actor.published} groups published, "
            f"{actor.in_flight} in flight, heard {actor.silent_s:.1f} s ago"
            + (f"; weights: {actor.weights}" if actor.weights else "")
            + (f" by {actor.transport}" if actor.transport else "")
        )
    return "\n".join(lines if status.actors else [*lines, "no actor has joined"])


def progress_line(status: Status) -> str:
    """The status in one line."""
    versions = " ".join(str(actor.version) for actor in status.actors) or "none"
    return (
        f"{status.phase} {status.step}/{status.max_steps} | reward {_shown(status.reward, '.3f')} | "
        f"staleness {_shown(status.staleness_mean, '.2f')} (max {_shown(status.staleness_max, 'd')}, "
        f"bound {status.max_staleness}) | queued {status.groups.queued} | "
        f"{_shown(status.tokens_per_second, '.0f')} tok/s | actors at {versions}"
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def find_run(url: str, name: str | None, *, ended: bool = True) -> Stream:
    """The named run, or the only one on the server that goes on; failing that, if `ended`, one that is over.

    Raises `LaunchError` if there are several, `NoRun` if there is none.
    """
    client = connect(url)
    members: Any = client.smembers(RUNS)
    names = sorted(run.decode() for run in members)
    if name is None:
        going = [run for run in names if not _ended(client, run)] or (names if ended else [])
        if not going:
            raise NoRun(f"no run on {shown(url)}; start one with `launch learner`")
        if len(going) > 1:
            raise LaunchError(f"several runs on {shown(url)}: {', '.join(going)}; choose one with --run")
        name = going[0]
    elif name not in names:
        raise NoRun(f"no run {name} on {shown(url)}; it has {', '.join(names) or 'none'}")
    return Stream(client, name)


def _ended(client: redis.Redis, run: str) -> bool:
    return bool(client.hget(key(run, "state"), "ended"))
