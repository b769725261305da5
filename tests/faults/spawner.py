"""Starts scripted processes without importing everything again for each: it has, and forks.

One JSON line a request on standard input, one a reply on standard output: a `Start` is answered with the
pid, a pid with its exit code (null while it runs). Children end with it, and it ends with its parent.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Self

import msgspec

from buffer.process import end_with_parent
from tests.faults import actor, learner, weights  # noqa: F401 (imported before the fork, since it takes seconds)

MAIN = {"learner": learner.main, "actor": actor.main}
"""What a process runs; `serve` adds the real learner where it is asked for."""


class Start(msgspec.Struct):
    """A process to start."""

    module: str
    settings: str
    """JSON of its settings."""
    fault: str
    errors: str
    """File for what it writes to standard error."""


class Spawner:
    """The test's end of the pipe."""

    def __init__(self, root: Path, *, real: bool = False) -> None:
        """`real`: it can start the real learner, too, whose imports take seconds."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.spawner", *(["real"] if real else [])],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, request: Start) -> int:
        """Starts a process; its pid."""
        return self._ask(request)

    def poll(self, pid: int) -> int | None:
        """Its exit code, negative for a signal; None while it runs. Not to be asked again after that."""
        return self._ask(pid)

    def _ask(self, request: Start | int) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdout is not None
        self._process.communicate()
        assert self._process.returncode == 0


def _child(request: Start) -> None:
    """Becomes the process; does not return."""
    errors = os.open(request.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(errors, number)
    os.close(0)
    end_with_parent()
    os.environ["SLIPSTREAM_FAULT"] = request.fault
    sys.argv = [request.module, request.settings]
    code = 70
    try:
        code = MAIN[request.module]()
    except Exception:  # noqa: BLE001 - the process ends here
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    os._exit(code)


def serve(*, real: bool) -> None:
    """Answers requests until the test closes the pipe."""
    if real:
        from tests.faults import real_learner

        MAIN["real-learner"] = real_learner.main
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Start | int)
        if isinstance(request, Start):
            answer: int | None = os.fork()
            if answer == 0:
                _child(request)
        else:
            pid, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    end_with_parent()
    serve(real="real" in sys.argv)
