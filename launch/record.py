"""`launch record`: follows a run and keeps all it consumes, until the run ends."""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from buffer.client import Stream
from buffer.errors import NoRun, StreamError
from buffer.ledger import Snapshot
from buffer.members import JoinRecorder, Leave, RecorderBeat
from buffer.record import RecordFolder, describe_run, fetch_step
from launch.errors import LaunchError
from launch.local import Interrupt, Progress, run_folder

_LOOK_S = 0.3


def record_run(stream: Stream, path: Path, weights: Path | None, interrupt: Interrupt) -> int:
    """Records until the run has ended and all its steps are there, or until interrupted; how many steps.

    Raises `LaunchError` if steps are gone that the record would need.
    """
    joined = _join(stream, interrupt)
    if joined is None:
        return 0
    name, epoch, nonce = joined
    folder, progress, recorded = RecordFolder(path), Progress(), -1
    lineage, begun = 0, False
    while True:
        ledger = stream.call(Snapshot())
        version = ledger.number("version")
        if version >= 0 and not begun:
            files: Any = stream.redis.hgetall(stream.key("files"))
            folder.begin(describe_run(stream, nonce, ledger.state), {n.decode(): v for n, v in files.items()})
            begun = True
        if ledger.number("lineage") != lineage:
            lineage, recorded = ledger.number("lineage"), min(recorded, version - 1)
        for step in range(recorded + 1, version):
            if not folder.has(lineage, step):
                _record(stream, folder, lineage, step, ledger.number("covered"))
            recorded = step
            stream.call(RecorderBeat(name, epoch, recorded))
        stream.call(RecorderBeat(name, epoch, recorded))
        progress.show(f"recorded {recorded + 1} of {ledger.state['max_steps']} steps in {path}")
        if interrupt.asked or (ledger.state["ended"] and recorded >= version - 1):
            break
        time.sleep(_LOOK_S)
    progress.close()
    stream.call(Leave("recorder", name, epoch))
    if begun:
        _keep_start(stream.run, path, weights)
    return recorded + 1


def _join(stream: Stream, interrupt: Interrupt) -> tuple[str, str, str] | None:
    """(name, epoch, nonce) of the recorder, once there is a run; None if interrupted first."""
    name = f"recorder-{secrets.token_hex(4)}"
    while not interrupt.asked:
        try:
            joined = stream.call(JoinRecorder(secrets.token_hex(16), name))
            return name, joined.epoch, joined.nonce
        except NoRun:
            time.sleep(_LOOK_S)
    return None


def _record(stream: Stream, folder: RecordFolder, lineage: int, step: int, covered: int) -> None:
    try:
        folder.add(fetch_step(stream, lineage, step))
    except StreamError as error:
        remedy = "start `launch record` before the learner, or `launch demo --record`"
        if step > covered:
            remedy = "the server lost it; the steps before it are recorded"
        raise LaunchError(f"{error}; {remedy}") from error


def _keep_start(run: str, path: Path, weights: Path | None) -> None:
    """Copies the checkpoint that step 0 trained from, if it is on this machine."""
    source = weights or run_folder(run) / "weights" / "0"
    if (path / "start").exists():
        return
    if source.exists():
        shutil.copytree(source, path / "start")
    else:
        print(
            f"the record lacks the weights that step 0 trained from: copy them to {path / 'start'}, or name "
            "them with --weights here or in `launch replay`",
            file=sys.stderr,
        )
