"""The learner's side of saving: a thread copies what is saved, then a process of its own writes the copy.

Weights and moments change in the optimizer only. So the copy is made while the next step runs forward and
backward; an optimizer that gets there first waits for it. Megatron-Core's own asynchronous save is
deprecated, and the library it points to needs CUDA.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
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
        saver.begin(state.name, parts, state)
        saver.copied()                # before a part changes
        saver.finished()              # None, until it is a `Written`: complete, or why not
    """

    def __init__(
        self, folder: Path, *, rank: int = 0, ranks: int = 1, module: str = "learner.checkpoint.writer"
    ) -> None:
        """`folder` is one all ranks see; `module` is what the process runs."""
        self._folder, self._rank, self._ranks, self._module = folder, rank, ranks, module
        self._snapshot = Snapshot()
        self._process: subprocess.Popen[bytes] | None = None
        self._job: Job | None = None
        self._copying: threading.Thread | None = None
        self._failed = ""
        self.stalled_s = 0.0
        """How long all optimizers so far waited for a copy."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._job is not None

    def begin(self, name: str, parts: Sequence[Part], state: State | None = None) -> None:
        """Starts to save these parts, which must not change before `copied`. Every rank does so; rank 0 gives
        the state. To be called from the main thread: the process dies with the thread that started it."""
        if self.busy:
            raise CheckpointError(f"checkpoint {name}: another is being written; wait for it")
        random = torch.get_rng_state().numpy().tobytes()
        self._job = Job(str(self._folder), name, state, self._rank, self._ranks, [], random)
        process = self._started()
        self._copying = threading.Thread(
            target=self._copy, args=(self._job, parts, process), name="checkpoint", daemon=True
        )
        self._copying.start()

    def copied(self) -> None:
        """Returns once the parts may change."""
        if self._copying is not None:
            began = time.monotonic()
            self._copying.join()
            self._copying = None
            self.stalled_s += time.monotonic() - began

    def _copy(self, job: Job, parts: Sequence[Part], process: subprocess.Popen[bytes]) -> None:
        """Copies, and tells the process to write."""
        assert process.stdin is not None
        try:
            whole = msgspec.structs.replace(job, slots=self._snapshot.take(parts))
            process.stdin.write(msgspec.json.encode(whole) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return  # it has died just now, which `finished` finds out
        except (OSError, RuntimeError) as error:
            self._failed = f"there is no memory for its copy: {error}"

    def finished(self) -> Written | None:
        """What became of the checkpoint that was begun, once; None while it is written or there is none."""
        if self._job is None or self._process is None:
            return None
        assert self._process.stdout is not None
        if not self._failed and not select.select([self._process.stdout], [], [], 0)[0]:
            return None
        line = b"" if self._failed else self._process.stdout.readline()
        self._job = None
        if line:
            return msgspec.json.decode(line, type=Written)
        self.copied()  # says why it could not, if it could not; it may be writing to the pipe until then
        code = self._end()
        error, self._failed = self._failed or f"the process that writes it ended with {code}", ""
        return Written(error, 0.0)

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
        self.close()

    def close(self) -> None:
        """Ends the process; a checkpoint that is not complete is given up."""
        self.copied()
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
