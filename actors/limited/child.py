"""The limited process: `python -m actors.limited.child FD`, with a socket at that descriptor.

Its standard streams are the null device. It ends when the socket closes or its parent dies.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec

from actors.errors import ActorError
from actors.limited.wire import Call, Load, Reply
from actors.loading import Caller, find
from buffer.process import end_with_parent

_PR_SET_CHILD_SUBREAPER = 36
"""`prctl` option: orphans among our descendants become our children (linux/prctl.h)."""


def limit(memory_mb: int) -> None:
    """Caps the address space, forbids core files, and takes in orphaned descendants (Linux only)."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def left_children() -> bool:
    """Whether any child still runs; ended ones are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def resident_mb() -> int:
    """Memory this process holds, MiB."""
    try:
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * resource.getpagesize() >> 20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def attempt(number: int, work: Callable[[], Any]) -> Reply:
    """The reply to one piece of the user's work, whatever it raises."""
    problem: Literal["", "raised", "memory"] = ""
    message, result = "", None
    try:
        result = work()
        msgspec.json.encode(result)
    except MemoryError:
        problem, result = "memory", None
    except ActorError as error:
        problem, message = "raised", str(error)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything, and the actor is told
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem, result = "raised", None
        message = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
    message = message.encode(errors="replace").decode()[:1000]
    return Reply(number, problem, message, result, left_children(), resident_mb())


def serve(wire: socket.socket) -> None:
    """Answers calls until the socket closes."""
    own, caller, lines = os.getpid(), Caller(), wire.makefile("rb")
    load = msgspec.json.decode(lines.readline(), type=Load)
    limit(load.memory_mb)
    made: list[Callable[..., Any]] = []
    loaded = attempt(0, lambda: made.append(find(load.factory, "factory")(*load.arguments)))
    wire.sendall(msgspec.json.encode(loaded) + b"\n")
    if loaded.problem:
        return

    for line in lines:
        call = msgspec.json.decode(line, type=Call)
        reply = attempt(call.number, partial(caller, made[0], *call.arguments))
        if os.getpid() != own:
            os._exit(0)  # the handler forked, and this is the copy: only the original answers
        wire.sendall(msgspec.json.encode(reply) + b"\n")


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    serve(socket.socket(fileno=int(sys.argv[1])))
