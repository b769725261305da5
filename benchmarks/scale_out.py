"""How long a new actor takes to be of use: `launch scale actors` in the middle of a run.

    python -m benchmarks.scale_out [--json] [--quick]

A demo begins with 2 actors and is scaled to 4, 1 and 3 (--quick: to 3 and 1). For every new actor: seconds
from the command to its engine's first answer, from there to its first weights, and from there to its first
group that the run accepted. For fewer actors: seconds until those that leave have drained. At the end
`launch verify` must find nothing. Also how long the learner stood still for a version: exporting, digesting
and committing it, as a share of the step.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.harness import parser, progress, report, table
from buffer.client import Stream
from buffer.errors import StreamError
from launch.local import stop_run
from launch.status import ActorStatus, find_run, read_status
from launch.verify import verify

LAUNCH = (sys.executable, "-m", "launch.cli")
SETTINGS = (
    "stream.max_steps=100000",
    "stream.groups_per_step=8",
    "stream.group_size=4",
    "sft.max_steps=1",
    "sft.batch=8",
)
PATIENCE_S = 300.0


class Joined(msgspec.Struct):
    """A new actor, seconds since the command."""

    engine: float = 0.0
    """Its engine answers."""
    weights: float = 0.0
    """It serves a version."""
    group: float = 0.0
    """A group of its own is accepted."""

    def see(self, actor: ActorStatus, now: float) -> bool:
        """Notes what has happened for the first time; whether all has."""
        self.engine = self.engine or now * (actor.state == "running")
        self.weights = self.weights or now * (actor.version >= 0)
        self.group = self.group or now * (actor.published > 0)
        return bool(self.group)

    def parts(self) -> dict[str, float]:
        """Seconds of each part, one after the other."""
        weights = max(0.0, self.weights - self.engine)
        return {
            "engine_s": self.engine,
            "weights_s": weights,
            "group_s": self.group - self.engine - weights,
            "total_s": self.group,
        }


def scale_to(count: int, stream: Stream, folder: Path) -> dict[str, Any]:
    """Scales the run; what that took, and the medians over the new actors."""
    known = {actor.name for actor in read_status(stream).actors}
    began = time.monotonic()
    command = subprocess.Popen(
        [*LAUNCH, "scale", "actors", str(count)], cwd=folder, stdout=subprocess.DEVNULL
    )
    joined: dict[str, Joined] = {}
    answered = 0.0
    while True:
        now = time.monotonic() - began
        if now > PATIENCE_S:
            raise SystemExit(f"not {count} actors after {PATIENCE_S:.0f} s: {joined}; see {folder}/runs")
        new = [actor for actor in read_status(stream).actors if actor.name not in known]
        done = [joined.setdefault(actor.name, Joined()).see(actor, now) for actor in new]
        answered = answered or now * (command.poll() is not None)
        if answered and len(new) >= count - len(known) and all(done):
            break
        time.sleep(0.05)
    if command.returncode:
        raise SystemExit(f"`launch scale actors {count}` ended with code {command.returncode}")
    parts = [one.parts() for one in joined.values()]
    figures = {name: median(part[name] for part in parts) for name in Joined().parts()} if parts else {}
    return {"actors": count, "new": len(parts), "answered_s": answered, **figures}


def measure(counts: list[int], folder: Path) -> dict[str, Any]:
    """The whole sequence, in a demo of its own."""
    with (folder / "demo.err").open("w") as err:
        demo = subprocess.Popen(
            [*LAUNCH, "demo", *SETTINGS], cwd=folder, stdout=subprocess.DEVNULL, stderr=err
        )
    url, deadline = folder / "runs/demo/redis.url", time.monotonic() + PATIENCE_S
    try:
        progress("2 actors start")
        while not url.exists() or not _trains(url.read_text().strip()):
            if demo.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the demo does not train: {(folder / 'demo.err').read_text()}")
            time.sleep(0.2)
        stream, scaled = find_run(url.read_text().strip(), None), []
        for count in counts:
            progress(f"to {count} actors")
            scaled.append(scale_to(count, stream, folder))
        found = verify(stream)
        stop_run(stream)
        demo.wait(PATIENCE_S)
    finally:
        demo.terminate()
        demo.wait()
    return {
        "stall": stall(folder / "runs/demo/metrics.jsonl"),
        "scaled": scaled,
        "verified": found.holds,
        "groups": found.groups.admitted,
        "code": demo.returncode,
    }


def stall(metrics: Path) -> dict[str, float]:
    """What publishing costs the learner: seconds, and the share of a step without its waiting; medians."""
    steps = [msgspec.json.decode(line) for line in metrics.read_bytes().splitlines()]
    publish = [step["seconds_publish"] for step in steps]
    busy = [step["time"] - step["time_batch"] - step["seconds_wait"] for step in steps]
    shares = [one / other for one, other in zip(publish, busy, strict=True)]
    return {"seconds": median(publish), "share": median(shares), "steps": len(steps)}


def _trains(url: str) -> bool:
    """Whether the run has taken steps, with all its actors."""
    try:
        status = read_status(find_run(url, None))
    except StreamError:  # the server comes up, or the run is to begin
        return False
    return status.step >= 2 and all(actor.published for actor in status.actors)


def main() -> int:
    """Entry point."""
    options = parser(__doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory(prefix="slipstream-scale-") as folder:
        result = measure([3, 1] if options.quick else [4, 1, 3], Path(folder))
    names = ("actors", "new", "answered_s", "engine_s", "weights_s", "group_s", "total_s")
    rows = [[one.get(name, "-") for name in names] for one in result["scaled"]]
    text = table(["actors", "new", "command", "engine", "weights", "first group", "together"], rows)
    stood = result["stall"]
    text += f"\n\na version costs the learner {stood['seconds'] * 1e3:.3g} ms, {stood['share']:.2%} of a step"
    report(result, text, options)
    return 0 if result["verified"] and result["code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
