"""Functions that do what a worker process must survive, and the factory that hands them out."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEAK: list[bytearray] = []


def factory(name: str) -> Callable[..., Any]:
    """The function of this module with that name, as a handler."""
    return globals()[name]


def echo(*values: Any) -> list[Any]:
    return list(values)


def pid() -> int:
    return os.getpid()


async def later(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "later"


def hang() -> None:
    while True:
        time.sleep(1)


def spin() -> None:
    while True:
        pass


def hang_unless(text: str) -> str:
    return text if text else str(hang())


def segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    sys.exit(3)


def flood(stream: int) -> None:
    block = b"x" * 65536
    while True:
        os.write(stream, block)


def flood_and_answer() -> str:
    for stream in (1, 2):
        for _ in range(200):
            os.write(stream, b"x" * 65536)
    return "dry"


def swallow() -> str:
    """Greedy, but done in time."""
    return "x" * (512 << 20)


def leak(megabytes: int) -> int:
    LEAK.append(bytearray(os.urandom(1) * (megabytes << 20)))
    return os.getpid()


def fork_copy() -> bool:
    """The copy returns as well, as if it were the worker, and first; only the worker leads a session."""
    if os.fork():
        time.sleep(0.3)
    return os.getsid(0) == os.getpid()


def forge() -> None:
    """Answers for itself, and a call that nobody made."""
    for number in range(3, 512):
        try:
            os.write(number, b'[7,"","",1.0,false,1]\n')
        except OSError:
            continue


def leave_orphan(folder: str) -> str:
    """A grandchild in a session of its own whose parent has ended."""
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            Path(folder, str(os.getpid())).touch()
            time.sleep(600)
        os._exit(0)
    os.wait()
    while not list(Path(folder).iterdir()):
        time.sleep(0.01)
    return "left"


def tell_and_hang(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    hang()


def leave_children(folder: str) -> str:
    """Children in the worker's session and out of it, and a return as if nothing was."""
    for number in range(4):
        code = f"import os,time; open(r'{folder}/'+str(os.getpid()),'w').close(); time.sleep(600)"
        subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=number % 2 == 0)
    while len(list(Path(folder).iterdir())) < 4:
        time.sleep(0.01)
    return "left"


def leave_children_and_hang(folder: str) -> None:
    leave_children(folder)
    hang()


def leave_children_and_crash(folder: str) -> None:
    leave_children(folder)
    segfault()


def garble() -> str:
    """Writes to every descriptor, the one that answers among them."""
    for number in range(3, 512):
        try:
            os.write(number, b"garbage\n")
        except OSError:
            continue
    return "fine"


def unwritable() -> object:
    return object()


def broken() -> float:
    return 1 / 0
