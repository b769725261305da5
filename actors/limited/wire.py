"""What goes over the socket between an actor and a limited process: one line of JSON each way."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

LINE_BYTES = 1 << 22
"""Longest line, either way."""


class Load(msgspec.Struct, array_like=True, frozen=True):
    """The first line to a process: what it is to run. Its answer is a `Reply` numbered 0."""

    factory: str
    """`module:function`; called once with `arguments`, it returns the handler of all calls, which may be
    an `async` function."""
    arguments: list[Any]
    """JSON values."""
    memory_mb: int
    """Limit of the address space of the process, and of each process it starts, MiB."""


class Call(msgspec.Struct, array_like=True, frozen=True):
    """Run the handler once."""

    number: int
    """Counts from 1; the reply repeats it."""
    arguments: list[Any]
    """JSON values, handed to the handler in this order."""


class Reply(msgspec.Struct, array_like=True, frozen=True):
    """How a call, or the load, ended."""

    number: int
    """That of the call; 0 for the load."""
    problem: Literal["", "raised", "memory"] = ""
    """Empty: `result` holds what the handler returned."""
    message: str = ""
    """What was raised, with its place."""
    result: Any = None
    """JSON value."""
    children: bool = False
    """Whether the handler left processes behind that still run."""
    resident_mb: int = 0
    """Memory of the process after the call, MiB."""
