"""Processes of this machine: started with a log each, watched, and ended without leaving any behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from buffer.process import end_with_parent

DRAIN_S = 30.0
"""How long a process may take to end in order before it is killed."""
FAILED_S = 5.0
"""The same once another one has failed: a rank may wait for it for ever."""


def process_environment(url: str) -> dict[str, str]:
    """The environment of a worker: the server's URL, out of sight of `ps`, one thread a process, and no
    warning of NCCL's behind its last words.
    """
    return {
        "SLIPSTREAM_REDIS": url,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


class Child:
    """A process in a session of its own."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal, None while it runs."""
        return self.process.poll()

    def kill(self) -> None:
        """Ends its whole process group at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        """The last line of its log, or how it was ended."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        said = lines[-1] if lines else "it said nothing"
        if self.returncode == -signal.SIGKILL:
            said = f"it was killed, perhaps for want of memory; its last line: {said}"
        return said


class Supervisor:
    """Starts children and ends all of them when it closes.

    Worked example::

        with Supervisor() as children:
            learner = children.start("learner", ["python", "-m", "learner.worker"], {}, Path("learner.log"))
            learner.process.wait()
        # whatever still ran has had SIGTERM, then, after DRAIN_S (FAILED_S after an error), SIGKILL
    """

    def __init__(self) -> None:
        self.children: list[Child] = []

    def start(self, name: str, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Child:
        """Starts a process; its output goes to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def stop(self, children: Sequence[Child], timeout_s: float = DRAIN_S) -> None:
        """SIGTERM to all, then SIGKILL to the process groups of those that stay."""
        for child in children:
            if child.returncode is None:
                child.process.terminate()
        deadline = time.monotonic() + timeout_s
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(self.children, FAILED_S if error else DRAIN_S)
