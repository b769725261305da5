"""What a finished run amounts to: `runs/<name>/summary.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from buffer.ledger import Ledger
from launch.config import RunConfig
from launch.local import run_folder
from launch.status import GroupCounts, of_ledger

FIRST_STEPS = 10
LAST_STEPS = 20


class Summary(msgspec.Struct, frozen=True):
    """Figures of a run, from its metrics and its last snapshot."""

    run: str
    """Name of the run."""
    ended: str
    """`done`, `stopped`, or why else."""
    steps: int
    """Steps trained."""
    seconds: float
    """From the command's start to the end of the run, start-up included."""
    train_seconds: float
    """From the first step's batch to the end of the last step."""
    reward_first: float | None
    """Mean over the first 10 steps; null if no step was trained."""
    reward_last: float | None
    """Mean over the last 20 steps."""
    staleness_mean: float | None
    """Over all trained groups, in steps."""
    staleness_max: int | None
    """Of a trained group; null if none was trained."""
    max_staleness: int
    """The bound."""
    groups: GroupCounts
    """Where all groups were at the end."""
    conserved: bool
    """Whether admitted = leased + queued + assigned + trained + dropped."""
    versions: int
    """Committed versions, version 0 included."""
    tokens_per_second: float | None
    """Trained answer tokens over `train_seconds`."""
    overlap: float | None
    """Share of the training time in which some actor was generating."""
    utilisation: float | None
    """Of the time in which an actor held a lease, the share in which its engine had a request under way, the
    times when new weights went in apart; over all actors seen last. Null if they were not seen at all."""
    evaluations: list[dict[str, Any]]
    """`version`, `samples`, `mean_at_k` and `pass_at_k` of each evaluation made while it trained."""
    report: dict[str, Any]
    """What the learner found at the end: check of the engines' weights, held-out accuracy, examples."""


def summarise(folder: Path, ledger: Ledger, run: str, seconds: float) -> Summary:
    """The summary of the run that left its metrics in `folder`, also written to `summary.json` there."""
    status = of_ledger(run, ledger)
    steps = read_jsonl(folder / "metrics.jsonl")
    rewards = [step["reward_mean"] for step in steps if step["reward_mean"] is not None]
    train_seconds = steps[-1]["time"] - steps[0]["time_batch"] if steps else 0.0
    tokens = sum(step["tokens"] for step in steps)
    report = folder / "report.json"
    summary = Summary(
        run=run,
        ended=ledger.state["ended"] or "unfinished",
        steps=len(steps),
        seconds=round(seconds, 1),
        train_seconds=round(train_seconds, 1),
        reward_first=_mean(rewards[:FIRST_STEPS]),
        reward_last=_mean(rewards[-LAST_STEPS:]),
        staleness_mean=status.staleness_mean,
        staleness_max=status.staleness_max,
        max_staleness=status.max_staleness,
        groups=status.groups,
        conserved=status.conserved,
        versions=ledger.number("version") + 1,
        tokens_per_second=round(tokens / train_seconds, 1) if train_seconds else None,
        overlap=overlap(read_jsonl(folder / "timeline.jsonl")),
        utilisation=utilisation(ledger),
        evaluations=[
            {name: line[name] for name in ("version", "samples", "mean_at_k", "pass_at_k")}
            for line in read_jsonl(folder / "evaluations.jsonl")
        ],
        report=msgspec.json.decode(report.read_bytes()) if report.exists() else {},
    )
    (folder / "summary.json").write_bytes(msgspec.json.encode(summary) + b"\n")
    return summary


def conclude(config: RunConfig, ledger: Ledger | None, seconds: float) -> Summary | None:
    """Summary and plots of a run that is over; None if it never began."""
    from launch.plots import plot_run

    if ledger is None:
        return None
    folder = run_folder(config.name)
    summary = summarise(folder, ledger, config.name, seconds)
    plot_run(folder, config.stream.max_staleness)
    return summary


def render(summary: Summary) -> str:
    """The summary as a page of text."""
    weights, held_out = summary.report.get("weights", {}), summary.report.get("held_out", {})
    differences = ", ".join(
        f"{name} {value:.1e}" for name, value in weights.get("max_difference", {}).items()
    )
    mean = "-" if summary.staleness_mean is None else f"{summary.staleness_mean:.2f}"
    lines = [
        f"run         {summary.run}: {summary.ended} after {summary.steps} steps, {summary.seconds:.0f} s",
        f"reward      {summary.reward_first} (first {FIRST_STEPS} steps) -> "
        f"{summary.reward_last} (last {LAST_STEPS})",
        f"staleness   mean {mean}, max {summary.staleness_max}, bound {summary.max_staleness}",
        f"groups      {summary.groups.identity(summary.conserved)}",
        f"tokens/s    {summary.tokens_per_second}; actors generated during {summary.overlap:.0%} of training"
        if summary.overlap is not None
        else "tokens/s    -",
        f"engines     busy for {summary.utilisation:.1%} of the time in which leases were held"
        if summary.utilisation is not None
        else "engines     -",
        f"weights     engines differ from the learner by at most: {differences or 'not checked'}",
    ]
    if summary.evaluations:
        shown = ", ".join(f"{one['mean_at_k']:.3f} at {one['version']}" for one in summary.evaluations)
        lines.append(f"evaluated   mean@{summary.evaluations[-1]['samples']} {shown}")
    if held_out:
        lines.append(f"held out    accuracy {held_out['accuracy']:.3f} on {held_out['prompts']} questions")
        lines += [f"            {e['question']:.60} -> {e['answered']:.60}" for e in held_out["examples"]]
    return "\n".join([*lines, f"files       {run_folder(summary.run)}"])


def utilisation(ledger: Ledger) -> float | None:
    """What the actors' last heartbeats say of their engines' use, as a share of the time leases were held."""
    stats = [record.stats for record in ledger.actors.values()]
    held = sum(float(figures.get("held_s", 0)) for figures in stats)
    busy = sum(float(figures.get("busy_s", 0)) for figures in stats)
    return round(busy / held, 4) if held else None


def overlap(spans: list[dict[str, Any]]) -> float | None:
    """Share of the time of `train` spans that is covered by `generate` spans of any lane.

    >>> overlap([{"kind": "train", "start": 0.0, "end": 4.0}, {"kind": "generate", "start": 1.0, "end": 2.0},
    ...          {"kind": "generate", "start": 1.5, "end": 3.0}])
    0.5
    """
    merged: list[list[float]] = []
    for start, end in sorted((s["start"], s["end"]) for s in spans if s["kind"] == "generate"):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    trained = [(s["start"], s["end"]) for s in spans if s["kind"] == "train"]
    total = sum(end - start for start, end in trained)
    covered = sum(
        max(0.0, min(end, stop) - max(start, begin)) for begin, stop in trained for start, end in merged
    )
    return round(covered / total, 4) if total else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, a line each; none if there is no file."""
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
