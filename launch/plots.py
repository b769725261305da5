"""Pictures of a run: reward, staleness, and who did what when."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from launch.summary import read_jsonl

_INK, _FAINT, _ACCENT = "#1b3a57", "#9db4c8", "#c8553d"
_WINDOW = 10


def plot_run(folder: Path, max_staleness: int) -> list[Path]:
    """Writes `reward.png`, `staleness.png` and `timeline.png`; an empty list if no step was trained."""
    import matplotlib

    matplotlib.use("Agg")
    steps = read_jsonl(folder / "metrics.jsonl")
    if not steps:
        return []
    return [
        _reward(folder / "reward.png", steps, read_jsonl(folder / "evaluations.jsonl")),
        _staleness(folder / "staleness.png", steps, max_staleness),
        _timeline(folder / "timeline.png", read_jsonl(folder / "timeline.jsonl")),
    ]


def _axes(title: str, across: str, up: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.set_title(title, loc="left", color=_INK, fontsize=12)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _reward(path: Path, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Path:
    """Reward by step; with evaluations, how well the version that a step trained from answered them."""
    figure, axes = _axes("Mean reward of the groups a step trained", "step", "reward")
    across = [step["step"] for step in steps]
    rewards = [math.nan if step["reward_mean"] is None else step["reward_mean"] for step in steps]
    smooth = [
        sum(rewards[max(0, i - _WINDOW + 1) : i + 1]) / min(i + 1, _WINDOW) for i in range(len(rewards))
    ]
    axes.plot(across, rewards, color=_FAINT, linewidth=1, label="step")
    axes.plot(across, smooth, color=_INK, linewidth=2, label=f"mean of {_WINDOW} steps")
    by_version = {found["version"]: found for found in evaluations}  # after a fork the later one counts
    if newest := [by_version[version] for version in sorted(by_version)]:
        axes.errorbar(
            [found["version"] for found in newest],
            [found["mean_at_k"] for found in newest],
            yerr=[found["standard_error"] or 0.0 for found in newest],
            color=_ACCENT,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.2,
            label=f"evaluation, mean@{newest[-1]['samples']} of the version",
        )
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")
    return _save(figure, path)


def _staleness(path: Path, steps: list[dict[str, Any]], bound: int) -> Path:
    figure, axes = _axes("Staleness of the groups a step trained", "step", "staleness (steps)")
    across = [step["step"] for step in steps]
    axes.plot(across, [step["staleness_max"] for step in steps], color=_FAINT, linewidth=1, label="max")
    axes.plot(across, [step["staleness_mean"] for step in steps], color=_INK, linewidth=1.5, label="mean")
    axes.axhline(bound, color=_ACCENT, linestyle="--", linewidth=1.5, label=f"bound ({bound})")
    axes.set_ylim(-0.1, bound + 0.6)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def _timeline(path: Path, spans: list[dict[str, Any]], seconds: float = 10.0) -> Path:
    """The middle `seconds` of the run: a lane for the learner and each actor."""
    figure, axes = _axes("Generation and training overlap", "seconds", "")
    middle = (min(s["start"] for s in spans) + max(s["end"] for s in spans)) / 2
    begin, end = middle - seconds / 2, middle + seconds / 2
    shown = [s for s in spans if s["end"] > begin and s["start"] < end]
    lanes = sorted({s["lane"] for s in shown}, reverse=True)
    for lane in lanes:
        bars = [(s["start"] - begin, s["end"] - s["start"]) for s in shown if s["lane"] == lane]
        color = _ACCENT if lane == "learner" else _INK
        axes.broken_barh(bars, (lanes.index(lane) - 0.35, 0.7), facecolor=color, alpha=0.45)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlim(0, seconds)
    return _save(figure, path)
