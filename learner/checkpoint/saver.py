"""The learner's side of saving: a copy in memory, then a process of its own writes.

The step waits for the copy only. Megatron-Core's own asynchronous save is deprecated, and the library it
points to needs CUDA.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec
import torch

from learner.checkpoint.folder import State
from learner.checkpoint.snapshot import Snapshot
from learner.checkpoint.state import Part
from learner.checkpoint.writer import Job, Written
from learner.errors import CheckpointError

_LOOK_S = 0.05


class Saver:
    """Writes the checkpoints of one rank, one at a time.

    with Saver(folder, rank=0, ranks=1) as saver:
        saver.begin(state, parts)     # copies; the folder gets its name later
        saver.finished()              # None, until it is a `Written`: complete, or why not
    """

    def __init__(
        self, folder: Path, *, rank: int = 0, ranks: int = 1, module: str = "learner.checkpoint.writer"
    ) -> None:
        """`folder` is one all ranks see; `module` is what the process runs."""
        self.folder = folder
        self._rank, self._ranks, self._module = rank, ranks, module
        self._snapshot = Snapshot()
        self._process: subprocess.Popen[bytes] | None = None
        self._job: Job | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._job is not None

    def begin(self, state: State, parts: Sequence[Part]) -> None:
        """Starts to save these parts as they are now. Every rank does so, for the same state."""
        if self.busy:
            raise CheckpointError(f"checkpoint {state.name}: another is being written; wait for it")
        slots = self._snapshot.take(parts)
        random = torch.get_rng_state().numpy().tobytes()
        job = Job(str(self.folder), state, self._rank, self._ranks, slots, random)
        process, self._job = self._started(), job
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has died just now, which `finished` finds out
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()

    def finished(self) -> Written | None:
        """What became of the checkpoint that was begun, once; None while it is written or there is none."""
        if self._job is None or self._process is None:
            return None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], 0)[0]:
            return None
        line, job = self._process.stdout.readline(), self._job
        self._job = None
        if line:
            return msgspec.json.decode(line, type=Written)
        return Written(job.state, f"the process that writes it ended with {self._end()}", 0.0)

    def wait(self) -> Written | None:
        """As `finished`, once there is nothing to wait for any more."""
        while self.busy:
            if (written := self.finished()) is not None:
                return written
            time.sleep(_LOOK_S)
        return None

    def _started(self) -> subprocess.Popen[bytes]:
        """The process. It dies with this one, however that ends, and is out of reach of its Ctrl-C."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        python = [sys.executable, "-W", "ignore", "-m"]
        if self._process is None:
            self._process = subprocess.Popen(
                [*python, self._module, str(self._snapshot.fd), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._snapshot.fd],
                start_new_session=True,
            )
        return self._process

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process; a checkpoint that is not complete is given up."""
        if self._process is not None:
            self._end()
        os.close(self._snapshot.fd)

    def _end(self) -> int:
        """Ends the process, if it has not ended; its exit code. The next checkpoint gets another one."""
        assert self._process is not None
        process, self._process = self._process, None
        process.kill()
        with suppress(BrokenPipeError):
            process.communicate()
        return process.wait()
