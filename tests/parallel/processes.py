"""Ranks as processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0


def leave() -> NoReturn:
    """Ends a rank, successfully, once all have come here.

    Without Python's own end: a thread of gloo that gives the last tensor back in it aborts the process.
    """
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def run_two(module: str, folder: Path, *arguments: str) -> None:
    """Runs `python -m MODULE RANK FOLDER ARGUMENT...` for both, to their end; they write to FOLDER/log-RANK.

    Two ranks that share a GPU are on two hosts for NCCL, which refuses them otherwise, and talk by sockets.

    One that fails leaves the other waiting for it: then both are ended, and the test fails.
    """
    logs = [folder / f"log-{rank}" for rank in range(2)]
    apart = torch.cuda.device_count() < 2
    processes = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module, str(rank), str(folder), *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **({"NCCL_HOSTID": str(rank)} if apart else {})},
                cwd=ROOT,
            )
        processes.append(process)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            assert time.monotonic() < deadline, _said(logs)
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], _said(logs)


def _said(logs: list[Path]) -> str:
    return "\n".join(log.read_text()[-3000:] for log in logs)
