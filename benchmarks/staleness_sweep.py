"""Which correction earns what at which staleness.

    python -m benchmarks.staleness_sweep [--jobs 2] [--plot docs/sweep.png] [--json] [--quick]

eta {0, 2, 8} x {none, tis, icepop, PPO's clip in bypass} and vtrace at eta 2, each on three seeds and 100
steps, for answers of 3 or 4 tokens (`sums`) and of 64 (`digits`). One process a job, no engine, no Redis: see
`benchmarks.delay_line`. Prints a Markdown table, and with --json one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import groupby, pairwise
from pathlib import Path

import msgspec

ETAS = (0, 2, 8)
COMPARED = ("none", "tis", "icepop", "bypass")


def cells(tasks: list[str], seeds: int) -> list[tuple[str, str, int, int]]:
    """(task, method, eta, seed) of every run, a cell's seeds next to each other."""
    pairs = [(method, eta) for eta in ETAS for method in COMPARED] + [("vtrace", 2)]
    return [(task, method, eta, seed) for task in tasks for method, eta in pairs for seed in range(seeds)]


def work(quick: bool) -> None:
    """A job: runs from standard input, one JSON list a line; an outcome a line to standard output."""
    import torch

    from benchmarks.delay_line import FULL, QUICK, Run, train, warm_up

    torch.set_num_threads(1)
    sizes, starts = QUICK if quick else FULL, {}
    with tempfile.TemporaryDirectory(prefix="slipstream-sweep-") as folder:
        for line in sys.stdin:
            run = Run(*json.loads(line))
            key = f"{run.task}-{run.seed}"
            if key not in starts:
                starts[key] = warm_up(run.task, run.seed, Path(folder) / key, sizes)
            print(msgspec.json.encode(train(run, starts[key], sizes)).decode(), flush=True)


def sweep(tasks: list[str], seeds: int, jobs: int, quick: bool) -> list[dict]:
    """The outcomes of all runs, in the order of `cells`.

    A job has neighbours among the runs sorted by seed and task: few of them to warm up for, of both lengths.
    """
    runs = cells(tasks, seeds)
    sorted_runs = sorted(runs, key=lambda run: (run[3], run[0]))
    command = [sys.executable, "-m", "benchmarks.staleness_sweep", "--job", *(["--quick"] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    bounds = [len(runs) * job // jobs for job in range(jobs + 1)]
    parts = [sorted_runs[start:end] for start, end in pairwise(bounds)]
    processes = []
    for part in parts:
        text = "".join(json.dumps(run) + "\n" for run in part)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        process.stdin.write(text)
        process.stdin.close()
        processes.append(process)
    found = []
    for process in processes:
        found += [json.loads(line) for line in process.stdout]
        if process.wait():
            raise SystemExit(f"a job ended with code {process.returncode}; see its message above")
    order = {run: index for index, run in enumerate(runs)}
    return sorted(found, key=lambda outcome: order[tuple(outcome["run"].values())])


def by_cell(outcomes: list[dict]) -> list[dict]:
    """Means over seeds, and the range of the final reward."""
    rows = []
    cell = ("task", "method", "eta")
    for key, group in groupby(outcomes, lambda outcome: tuple(outcome["run"][name] for name in cell)):
        members = list(group)
        final = [outcome["reward_last"] for outcome in members]
        row = dict(zip(cell, key, strict=True))
        row |= {"reward": sum(final) / len(final), "reward_low": min(final), "reward_high": max(final)}
        for name in ("kl", "ess_raw", "masked", "seconds"):
            row[name] = sum(outcome[name] for outcome in members) / len(members)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The cells in Markdown."""
    lines = [
        "| task | eta | method | reward, last fifth (range) | KL k3 | ESS of ratios | masked |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row['reward']:.3f} ({row['reward_low']:.3f}-{row['reward_high']:.3f})"
        figures = f"{row['kl']:.1e} | {row['ess_raw']:.3f} | {row['masked']:.3f}"
        lines.append(f"| {row['task']} | {row['eta']} | {row['method']} | {spread} | {figures} |")
    return "\n".join(lines)


def plot(outcomes: list[dict], path: Path) -> None:
    """Reward by step, mean over seeds: a panel for each task and eta, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(outcome["run"]["task"] for outcome in outcomes))
    figure, panels = pyplot.subplots(
        len(tasks),
        len(ETAS),
        figsize=(11, 3.2 * len(tasks)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for i, task in enumerate(tasks):
        for j, eta in enumerate(ETAS):
            axes = panels[i][j]
            axes.set_title(f"{task}, eta {eta}", loc="left", fontsize=11)
            axes.spines[["top", "right"]].set_visible(False)
            for method in (*COMPARED, "vtrace"):
                wanted = {"task": task, "method": method, "eta": eta}
                curves = [o["rewards"] for o in outcomes if wanted.items() <= o["run"].items()]
                if curves:
                    axes.plot(
                        [sum(values) / len(values) for values in zip(*curves, strict=True)], label=method
                    )
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="the last line printed is one JSON object")
    parser.add_argument("--quick", action="store_true", help="a few steps; its figures mean nothing")
    parser.add_argument("--tasks", nargs="+", default=["sums", "digits"], choices=["sums", "digits"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(options.quick)
        return 0
    began = time.monotonic()
    outcomes = sweep(options.tasks, 1 if options.quick else options.seeds, options.jobs, options.quick)
    rows = by_cell(outcomes)
    print(table(rows))
    if options.plot:
        plot(outcomes, options.plot)
    if options.json:
        seconds = time.monotonic() - began
        print(json.dumps({"quick": options.quick, "seconds": seconds, "cells": rows, "runs": outcomes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
