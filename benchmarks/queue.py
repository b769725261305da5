"""Moving a group of 256 KiB from an actor to the learner: our full path against what others use.

    python -m benchmarks.queue [--appendfsync always|everysec|both] [--json] [--quick]

Every way takes the same groups, B = 16 a turn; turns are interleaved, figures are medians over turns,
a group. Ours is encode, publish with the ledger, assign, read, decode, commit with payloads deleted;
admission is not in it. It is compared with (a) XADD, XREADGROUP, XACK and XDEL of the arrays' bytes,
without codec or ledger, group by group and a batch at a time; (b) pickled Python lists on XADD and XREAD;
(c) a queue in a Ray actor; (d) lines of JSON in a file, synced as Redis syncs; (e) TransferQueue.
Readers end with arrays, as a learner packs them; (b) and (d) begin with the lists of an engine's answer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from benchmarks.groups import raw_bytes, realistic_group
from benchmarks.harness import parser, progress, report, server, table
from benchmarks.ray_ways import RayQueue, TransferQueue
from benchmarks.ways import JsonLines, Ours, Pickled, Raw, Way

BATCH = 16
OURS, RAW, JSON = "ours", "(a) raw, a group at a time", "(d) JSON lines in a file"


def ways(url: str, appendfsync: str) -> dict[str, Callable[[], Way]]:
    """How each way is made."""
    return {
        OURS: lambda: Ours(url, BATCH),
        RAW: lambda: Raw(url, together=False),
        "(a) raw, a batch at a time": lambda: Raw(url, together=True),
        "(b) pickled lists": lambda: Pickled(url),
        "(c) Ray actor, lists": lambda: RayQueue(lists=True),
        "(c) Ray actor, arrays": lambda: RayQueue(lists=False),
        JSON: lambda: JsonLines(sync=appendfsync == "always"),
        "(e) TransferQueue": TransferQueue,
    }


def measure(appendfsync: str, turns: int, *, ray: bool) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Figures by way, and why ways are missing."""
    groups = [realistic_group(seed) for seed in range(BATCH)]
    figures, missing = {}, {}
    with server(appendfsync) as local, ExitStack() as stack:
        running = {}
        for name, make in ways(local.url, appendfsync).items():
            if not ray and name[:3] in ("(c)", "(e)"):
                missing[name] = "--quick leaves out what needs Ray"
                continue
            try:
                running[name] = make()
            except ImportError as error:
                missing[name] = f"not installed: {error}; see requirements/bench.txt"
                continue
            stack.callback(running[name].close)
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for turn in range(turns + 1):
            progress(f"appendfsync {appendfsync}: turn {turn} of {turns}")
            for name, way in running.items():
                way.prepare(groups)
                start = time.perf_counter()
                arrived = way.turn()
                seconds[name].append(time.perf_counter() - start)
                if arrived != BATCH:
                    raise SystemExit(f"{name}: {arrived} of {BATCH} groups arrived")
        for name, way in running.items():
            figures[name] = {"ms": 1000 * median(seconds[name][1:]) / BATCH, "bytes": way.size}
    for figure in figures.values():
        figure["time_to_raw"] = figure["ms"] / figures[RAW]["ms"]
        figure["bytes_to_json"] = figure["bytes"] / figures[JSON]["bytes"]
    return figures, missing


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    options = parser(__doc__ or "")
    options.add_argument("--appendfsync", choices=["always", "everysec", "both"], default="both")
    options.add_argument(
        "--turns", type=int, default=15, help="turns of each way, after one that does not count"
    )
    chosen = options.parse_args(arguments)
    turns = 2 if chosen.quick else chosen.turns
    policies = ["always", "everysec"] if chosen.appendfsync == "both" else [chosen.appendfsync]
    result: dict[str, Any] = {
        "group_bytes": len(raw_bytes(realistic_group(0))),
        "batch": BATCH,
        "turns": turns,
    }
    rows = []
    for policy in policies:
        figures, missing = measure(policy, turns, ray=not chosen.quick)
        result[policy], result["missing"] = figures, missing
        for name, one in figures.items():
            rows.append([policy, name, one["ms"], one["time_to_raw"], one["bytes"], one["bytes_to_json"]])
        rows += [[policy, name, why, "", "", ""] for name, why in missing.items()]
    headings = ["appendfsync", "way", "ms a group", "time / (a)", "bytes a group", "bytes / JSON"]
    report(result, table(headings, rows), chosen)


if __name__ == "__main__":
    main(sys.argv[1:])
