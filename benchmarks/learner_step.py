"""What a step of the learner costs beside forward, backward and optimizer, when groups are queued.

    python -m benchmarks.learner_step [--model tiny|100m|both] [--json] [--quick]

The whole learner process with a real Redis: batches assigned and fetched in the background, weights exported,
digested and committed, checkpoints written. A scripted actor, a process of its own, keeps the queue full.
Times are medians over the steps after the second, on one thread; a step here has few tokens for the size of
the model, which makes the shares larger than those of real steps.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.harness import parser, progress, report, server, table
from buffer.client import Stream
from launch.config import RunConfig, convert, to_json
from launch.tiny_model import make_tiny_qwen3
from tests.faults.actor import ActorSettings

MODELS: dict[str, dict[str, int]] = {
    "tiny": {},
    "100m": {"hidden": 768, "layers": 13, "heads": 12, "kv_heads": 4, "head_dim": 64, "intermediate": 2640},
}
"""Shapes of the two models: 0.4 and 100.5 million parameters."""
GROUPS, SAMPLES, ANSWER, ETA = 4, 4, 128, 4
TRAINED = ("forward", "backward", "update")
BESIDE = ("pack", "score", "wait")
"""Parts of a step as the metrics name them."""
INSIDE = ("pack", "score", *TRAINED)


def settings(folder: Path, model: Path, steps: int) -> RunConfig:
    """A run on a few questions, with a checkpoint every second step."""
    rows = [{"question": f"{number}+1=", "answer": f"#### {number + 1}"} for number in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return convert(
        {
            "name": model.name,
            "model": {"path": str(model)},
            "data": {"path": str(folder / "data.jsonl")},
            "stream": {
                "groups_per_step": GROUPS,
                "group_size": SAMPLES,
                "max_staleness": ETA,
                "max_steps": steps,
            },
            "checkpoint": {"every": 2},
            "objective": {"abort": {"mismatch": 0}},  # what the actor says is made up
            "weightsync": {"timeout_s": 1.0},
        }
    )


@contextmanager
def scripted_actor(url: str, run: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers at once, to which no weights are sent."""
    told = ActorSettings(
        url=url, run=run, name="actor-0", log=str(folder / "actor.jsonl"), group_size=SAMPLES, lease_s=10,
        concurrency=GROUPS * (ETA + 1), group_s=0, answer=ANSWER, vocabulary=256, state="starting",
    )  # fmt: skip
    argv = [sys.executable, "-m", "tests.faults.actor", msgspec.json.encode(told).decode()]
    process = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def train(name: str, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run of so many steps."""
    from learner.worker import Learner, Settings

    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as path, server("always") as local:
        folder = Path(path)
        config = to_json(settings(folder, make_tiny_qwen3(folder / name, seed=0, **MODELS[name]), steps))
        with scripted_actor(local.url, name, folder):
            told = msgspec.json.decode(config, type=Settings)
            Learner(Stream.connect(local.url, name), told, config, folder / "run").run()
        return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds by part, and what is to be shown: shares of the step, and of the time a save takes.

    A step lasts from the version before it being published to its own being so.
    """

    def middle(of: Callable[[dict[str, Any], dict[str, Any]], float]) -> float:
        return median(of(before, after) for before, after in pairwise(rows[1:]))

    def trained(row: dict[str, Any]) -> float:
        return sum(row[f"seconds_{part}"] for part in TRAINED)

    def wall(before: dict[str, Any], after: dict[str, Any]) -> float:
        return after["time"] - before["time"]

    parts = {part: middle(lambda _, row: row[f"seconds_{part}"]) for part in (*TRAINED, *BESIDE)}  # noqa: B023
    parts["rest of the step"] = middle(
        lambda _, row: row["seconds"] - sum(row[f"seconds_{p}"] for p in INSIDE)
    )
    parts["publish"] = middle(lambda _, row: row["seconds_publish"])
    told = ("", "_publish", "_checkpoint", "_wait")
    parts["record"] = middle(lambda before, row: wall(before, row) - sum(row[f"seconds{p}"] for p in told))
    saves = {row["seconds_saving"] for row in rows} - {0.0}
    times = {
        **parts,
        "step": middle(wall),
        "beside": middle(lambda before, row: wall(before, row) - trained(row)),
        "fetch, in the background": middle(lambda _, row: row["seconds_fetch"]),
        "wait for a checkpoint": sum(row["seconds_checkpoint"] for row in rows) / max(1, len(saves)),
    }
    shares = {"beside_share": middle(lambda before, row: 1 - trained(row) / wall(before, row))}
    if saves:  # of a tiny model's few steps none may last as long as a save
        times["save, in the background"] = median(saves)
        shares["stall_share"] = times["wait for a checkpoint"] / times["save, in the background"]
    return {**{name: 1000 * seconds for name, seconds in times.items()}, **shares}


def main() -> int:
    """Measures and reports."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", choices=(*MODELS, "both"), default="both")
    args = options.parse_args()
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.basicConfig(level="WARNING")
    names = ["tiny"] if args.quick else [args.model] if args.model != "both" else list(MODELS)
    result = {}
    for name in names:
        progress(f"{name} ...")
        result[name] = figures(train(name, steps=7 if args.quick else 121 if name == "tiny" else 9))
    rows = [[part, *(result[name][part] for name in names)] for part in result[names[0]]]
    report(result, table(["ms a step; shares of 1", *names], rows), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
