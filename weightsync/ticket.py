"""What an agent and the loader inside its engine say to each other, by files of one folder.

The engine is told to load by SGLang's own call, with nothing in it; what to load is in the ticket, which
is there before the call. Every rank of the engine answers with a report, which is there after it.

    <folder>/ticket             Ticket, msgpack
             report-<pid>       Report, msgpack
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from weightsync.errors import WeightSyncError

FOLDER = "SLIPSTREAM_WEIGHTS"
"""Environment variable of the engine that names the folder."""
LOADER = "weightsync.loader.load"
"""The function that obeys tickets, as SGLang finds it; it is not imported here, since it brings torch."""


class Ticket(msgspec.Struct, frozen=True):
    """One order to load a version."""

    number: int
    """Of this order; reports repeat it, so that an old one is not taken for an answer."""
    image: str
    """Path of the sealed image, or of the guard of its slot in GPU memory."""
    manifest: bytes
    """The manifest as it travels."""
    check: bool
    """Whether every copied element is compared afterwards."""
    gpu: bool = False
    """Whether `image` is a slot's guard."""


class Report(msgspec.Struct, frozen=True):
    """What became of a ticket in one rank of the engine."""

    number: int
    """That of the ticket; -1 if it could not be read."""
    pid: int
    """Process id of the rank."""
    problem: str = ""
    """Why the version is not loaded; empty if it is."""
    touched: bool = False
    """Whether weights may have been changed: with a problem, the engine must not go on."""
    way: str = ""
    """`names`: by the model's own loading of Hugging Face names; `plan`: by the copies that makes."""
    reason: str = ""
    """Why it is `names` for every version of this layout; empty if the next one goes by plan."""
    tensors: int = 0
    """Tensors of the engine that were filled."""
    copies: int = 0
    """Copies that took."""
    layout: str = ""
    """Fingerprint of the engine's own tensors: names, dtypes, shapes."""
    seconds: float = 0.0
    """In the loader, checks included."""


def hand_in(folder: Path, ticket: Ticket) -> None:
    """Puts a ticket there, and clears away earlier reports."""
    for old in folder.glob("report-*"):
        old.unlink()
    _replace(folder / "ticket", msgspec.msgpack.encode(ticket))


def read_ticket(folder: Path) -> Ticket:
    """The ticket of a folder. Raises `WeightSyncError`."""
    try:
        return msgspec.msgpack.decode((folder / "ticket").read_bytes(), type=Ticket)
    except (OSError, msgspec.DecodeError) as error:
        raise WeightSyncError(f"ticket in {folder}: {error}") from error


def answer(folder: Path, report: Report) -> None:
    """Puts a rank's report there."""
    _replace(folder / f"report-{report.pid}", msgspec.msgpack.encode(report))


def reports(folder: Path, number: int) -> list[Report]:
    """The reports on a ticket so far."""
    found = [
        msgspec.msgpack.decode(path.read_bytes(), type=Report) for path in sorted(folder.glob("report-*"))
    ]
    return [report for report in found if report.number == number]


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}-{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
