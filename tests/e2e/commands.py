"""Running the real command line in tests."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

LAUNCH = (sys.executable, "-m", "launch.cli")
"""The command `launch` of this checkout."""


def launch(folder: Path, *argv: str) -> subprocess.Popen[bytes]:
    """A `launch` process in `folder`; its output goes to `<command>.out` and `<command>.err` there."""
    with (folder / f"{argv[0]}.out").open("w") as out, (folder / f"{argv[0]}.err").open("w") as err:
        return subprocess.Popen(
            [*LAUNCH, *argv],
            cwd=folder,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def finish(folder: Path, *argv: str, address_space: int = 0) -> subprocess.CompletedProcess[str]:
    """A `launch` command that ends by itself; `address_space` limits each of its processes, in bytes."""
    return subprocess.run(
        [*LAUNCH, *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=partial(limit_memory, address_space) if address_space else None,
    )


def limit_memory(address_space: int) -> None:
    """Lets this process and its children have no more virtual memory than this."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))


def output(folder: Path, *argv: str) -> str:
    """The standard output of a `launch` command that must succeed."""
    done = finish(folder, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def summary_of(folder: Path, command: str) -> dict[str, Any]:
    """The summary that `launch demo --json` or `launch learner --json` printed last."""
    return json.loads((folder / f"{command}.out").read_text().splitlines()[-1])


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The steps of the run that left its files in `folder`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder: workers, engines and servers of its runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve().is_relative_to(folder):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def worker_pid(folder: Path, *arguments: str, variable: str = "") -> int:
    """The pid of a worker that works in `folder`: the one with these `arguments`, such as `learner.worker`,
    and, if one is given, with this `NAME=value` in its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            argv = (process / "cmdline").read_bytes().decode().split("\0")
            mine = {*arguments} <= {*argv} and (process / "cwd").resolve().is_relative_to(folder)
            if mine and (not variable or variable in (process / "environ").read_text().split("\0")):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process of {' '.join(arguments)} {variable}")


def sockets() -> set[str]:
    """Folders of private servers' sockets on this machine."""
    root = Path(os.environ.get("TMPDIR", "/tmp"))
    return {path.name for path in root.glob("slipstream-*")}
