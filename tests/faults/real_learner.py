"""The real learner under test, a process of its own: Megatron-Core on a CPU, a tiny Qwen3.

It is `learner.worker` as it is, with the same log of events and the same points as the scripted one, put
around its calls from outside. Its points, in order:
`joined restored assigned trained committed ckpt-... ckpt-committed`; those of the process that writes are in
`writer.py`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import msgspec
import torch

import learner.step  # noqa: F401 (imported before the fork, since it takes seconds)
from buffer.session import Session
from learner import worker
from learner.checkpoint.restore import Restore
from learner.checkpoint.saver import Saver
from learner.step import Trainer
from tests.faults.points import Faults, Log
from tests.faults.real import RealSettings
from weightsync.manifest import Manifest


def watch(log: Log, faults: Faults) -> None:
    """Puts log and points around the calls of this process's learner."""
    session: list[Session] = []

    def after(owner: type, name: str, then: Callable[..., None]) -> None:
        method = getattr(owner, name)

        @wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            answer = method(self, *args, **kwargs)
            then(self, answer, *args)
            return answer

        setattr(owner, name, wrapped)

    def joined(self: Session, answer: None, *_: Any) -> None:
        if not session:
            session.append(self)
            log("joined", epoch=self.epoch, head=self.head, version=self.version)
            faults.at("joined")

    def restored(self: Restore, trainer: Trainer) -> None:
        log("restored", version=trainer.version)
        faults.at("restored")

    def assigned(self: Session, answer: Any, step: int) -> None:
        if answer.status == "batch":
            groups = [row.group for row in answer.manifest.rows]
            log("assigned", step=step, groups=groups, repeat=answer.reason == "repeat")
            faults.at("assigned")

    def trained(self: Trainer, answer: Any, groups: Any, step: int) -> None:
        log(
            "trained",
            step=step,
            lineage=session[0].known.lineage,
            groups=sorted(group.id for group in groups),
            oldest=[group.version_min for group in groups],
            digest=Manifest.of(self.version, self.export()).digest,
            untrue=[],
            replayed=self.version <= session[0].version,
        )
        faults.at("trained")

    def committed(self: Session, answer: Any, version: int, digest: str) -> None:
        log("committed", version=version, digest=digest, epoch=self.epoch)
        faults.at("committed")

    def checkpoint(self: Session, answer: Any, version: int, digest: str, oldest: int) -> None:
        log("checkpoint", version=version, oldest=oldest, epoch=self.epoch)
        faults.at("ckpt-committed")

    after(Session, "reconcile", joined)
    after(Restore, "trainer", restored)
    after(Session, "assign", assigned)
    after(Trainer, "train_step", trained)
    after(Session, "commit", committed)
    after(Session, "checkpoint", checkpoint)


def main() -> int:
    """Entry point of the process."""
    settings = msgspec.json.decode(sys.argv[1], type=RealSettings)
    log = Log(settings.log)
    said = Path(settings.log).with_suffix(".text")
    logging.basicConfig(filename=said, level="WARNING", format="%(message)s")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watch(log, Faults("learner"))
    Saver.__init__.__kwdefaults__["module"] = "tests.faults.writer"
    os.environ |= {"SLIPSTREAM_REDIS": settings.url, "SLIPSTREAM_FULL_AFTER": str(settings.full_after)}
    fork = [] if settings.fork is None else ["--fork", str(settings.fork)]
    sys.argv = ["learner", "--folder", settings.folder, *fork]
    code = worker.main()
    last = said.read_text().splitlines()[-1]
    log("stopped", reason=last, code=code)
    return code
