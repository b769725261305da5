"""`launch inspect`: dead letters, what is wrong with each, and putting prompts back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from buffer.client import Stream
from buffer.codec import decode
from buffer.errors import RecordError
from buffer.prompts import Requeue, decode_prompt
from launch.errors import LaunchError


class DeadLetter(msgspec.Struct, frozen=True):
    """A prompt that was retired, or a payload that could not be read."""

    entry: str
    """Entry id of the letter, for `--requeue`."""
    group: str
    """Id of the group, see `buffer.schema.group_id`."""
    reason: str
    """Why it is here, such as `poison` or `expired`."""
    attempt: int
    """How many leases of its prompt ended without a group before that one."""
    row: int | None
    """Row of the data set, if the letter holds the prompt; else the prompt went back to the queue."""
    prompt_tokens: int
    """Length of the prompt; 0 if the letter does not hold it."""
    payload_bytes: int
    """Bytes of the record as stored; 0 without one."""
    problem: str
    """What decoding the payload says, empty without one."""


def dead_letters(stream: Stream) -> list[tuple[DeadLetter, bytes]]:
    """All letters with their payloads, the oldest first."""
    found: Any = stream.redis.xrange(stream.key("dead"))
    return [_letter(entry.decode(), fields) for entry, fields in found]


def _letter(entry: str, fields: dict[bytes, bytes]) -> tuple[DeadLetter, bytes]:
    payload, record = fields[b"payload"], fields[b"prompt"]
    prompt = decode_prompt(record) if record else None
    letter = DeadLetter(
        entry=entry,
        group=fields[b"group"].decode(),
        reason=fields[b"reason"].decode(),
        attempt=int(fields[b"attempt"]),
        row=prompt.row if prompt else None,
        prompt_tokens=len(prompt.tokens) if prompt else 0,
        payload_bytes=len(payload),
        problem=_problem(payload),
    )
    return letter, payload


def _problem(payload: bytes) -> str:
    if not payload:
        return ""
    try:
        decode(payload)
    except RecordError as error:
        return f"{error.field}: {error.problem}"
    return "none: it decodes"


def save_payloads(letters: list[tuple[DeadLetter, bytes]], folder: Path) -> list[Path]:
    """Writes each payload to `<group>.<entry>.frame` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for letter, payload in letters:
        if payload:
            paths.append(folder / f"{letter.group}.{letter.entry}.frame")
            paths[-1].write_bytes(payload)
    return paths


def requeue(stream: Stream, entry: str) -> int:
    """Puts a letter's prompt back at the tail of the queue; its position. Raises `LaunchError`."""
    position = stream.call(Requeue(entry)).position
    if position < 0:
        raise LaunchError(
            f"run {stream.run} has no dead letter {entry} (any more); `launch inspect --dead` lists them"
        )
    return position


def render(letters: list[tuple[DeadLetter, bytes]]) -> str:
    """The letters as a page of text."""
    if not letters:
        return "no dead letters"
    lines = [f"{'entry':<20} {'group':<18} {'reason':<9} {'attempt':>7}  what"]
    for letter, _ in letters:
        prompt = (
            f"prompt of row {letter.row}, {letter.prompt_tokens} tokens" if letter.row is not None else ""
        )
        payload = f"payload of {letter.payload_bytes} bytes: {letter.problem}" if letter.payload_bytes else ""
        what = "; ".join(filter(None, [prompt or "its prompt went back to the queue", payload]))
        lines.append(f"{letter.entry:<20} {letter.group:<18} {letter.reason:<9} {letter.attempt:>7}  {what}")
    return "\n".join(lines)
