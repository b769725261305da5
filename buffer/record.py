"""The replay store: what a run consumed, in a folder that another machine can train from again.

    record/
      run.json                   the run: rules, configuration, where and with what it was trained
      files/                     model config and tokenizer files
      start/                     the checkpoint that step 0 trained from
      steps/0000-00000007.step   lineage and step: its manifest, its payloads, the digest it led to

A step file is one zstd frame with a checksum around msgpack, written whole or not at all. It appears
after its step was committed; while a recorder lives, nothing it has not recorded is deleted in Redis.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from buffer.batches import Manifest
from buffer.client import Stream
from buffer.codec import decode
from buffer.errors import RecordError, StreamError
from buffer.members import Rules
from buffer.routed import attach
from buffer.schema import Group
from buffer.stream import read_frames, with_routed

FORMAT = 1
"""Version of the folder's layout."""
_FILE_LIMIT = 8 << 30


class RecordedRun(msgspec.Struct):
    """`run.json`."""

    run: str
    """Name of the run."""
    nonce: str
    """Random name of this very run, see `Joined.nonce`."""
    start_digest: str
    """Digest of version 0."""
    rules: dict[str, Any]
    """Its `Rules` by name."""
    config: msgspec.Raw
    """The resolved configuration, as the learner gave it."""
    environment: dict[str, str]
    """Package versions, instruction set and thread count of the learner."""
    format: int = FORMAT
    """Version of the folder's layout; another one is refused."""


class RecordedStep(msgspec.Struct, array_like=True):
    """A step file."""

    lineage: int
    """Lineage in which the step was trained."""
    step: int
    """Number of the step, from 0."""
    digest: str
    """Of version step + 1, as committed."""
    manifest: Manifest
    """What was assigned to it, strikes included."""
    payloads: dict[str, bytes]
    """By group, of all that were trained."""
    routed: dict[str, tuple[bytes, ...]] = {}
    """By group, the chunks of its routed experts, of those that have some."""

    def groups(self, *, routed: bool = False) -> list[Group]:
        """The groups it trained, in canonical order, on demand with routed experts. Raises `RecordError`."""
        rows = self.manifest.groups()
        missing = [row.group for row in rows if row.group not in self.payloads]
        if missing:
            raise RecordError("not in the step's file", field="payload", group=missing[0])
        groups = [decode(self.payloads[row.group], entry=row.entry) for row in rows]
        if not routed:
            return groups
        return [attach(group, self.routed.get(group.id, ())) for group in groups]


class RecordFolder:
    """A replay store on disk.

    Worked example::

        folder = RecordFolder(Path("record"))
        folder.begin(run)
        folder.add(RecordedStep(0, 0, digest, manifest, payloads))
        [step.step for step in folder.steps()]      # [0]
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, run: RecordedRun, files: dict[str, bytes]) -> None:
        """Makes the folder, or goes on with one of the same run. Raises `StreamError` for another's."""
        (self.path / "steps").mkdir(parents=True, exist_ok=True)
        if (self.path / "run.json").exists() and self.run().nonce != run.nonce:
            raise StreamError(f"{self.path} holds a record of another run; choose an empty folder")
        (self.path / "files").mkdir(exist_ok=True)
        for name, content in files.items():
            _write(self.path / "files" / Path(name).name, content)
        _write(self.path / "run.json", msgspec.json.format(msgspec.json.encode(run), indent=2))

    def run(self) -> RecordedRun:
        """What is recorded of the run. Raises `StreamError` if this is no record, or of another release."""
        path = self.path / "run.json"
        try:
            run = msgspec.json.decode(path.read_bytes(), type=RecordedRun)
        except (OSError, msgspec.MsgspecError) as error:
            raise StreamError(
                f"{self.path} is no record of a run: {error}; `launch record` makes one"
            ) from error
        if run.format != FORMAT:
            raise StreamError(f"{path}: got format {run.format}, this release reads {FORMAT}")
        return run

    def add(self, step: RecordedStep) -> None:
        """Writes a step, whole or not at all."""
        packed = msgspec.msgpack.encode(step)
        frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(packed)
        _write(self._file(step.lineage, step.step), frame)

    def has(self, lineage: int, step: int) -> bool:
        """Whether a step is there."""
        return self._file(lineage, step).exists()

    def steps(self) -> Iterator[RecordedStep]:
        """The steps that led to the newest weights, from 0: after a fork those of the newer lineage.

        Raises `StreamError` naming a step that is missing, or a file that is damaged.
        """
        found: dict[int, int] = {}
        for path in sorted((self.path / "steps").glob("*.step")):
            lineage, step = map(int, path.stem.split("-"))
            found[step] = max(lineage, found.get(step, 0))
        lineage = 0
        for expected, step in enumerate(sorted(found)):
            if found[step] < lineage:
                return  # the older lineage went on for longer, and was left
            lineage = found[step]
            if step != expected:
                raise StreamError(f"{self.path}: step {expected} is missing; a replay needs every step")
            yield self._read(self._file(lineage, step))

    def _file(self, lineage: int, step: int) -> Path:
        return self.path / "steps" / f"{lineage:04d}-{step:08d}.step"

    @staticmethod
    def _read(path: Path) -> RecordedStep:
        frame = path.read_bytes()
        try:
            if zstandard.frame_content_size(frame) > _FILE_LIMIT:
                raise StreamError(f"{path}: declares more than {_FILE_LIMIT} bytes")
            packed = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
            return msgspec.msgpack.decode(packed, type=RecordedStep)
        except (zstandard.ZstdError, msgspec.MsgspecError) as error:
            raise StreamError(f"{path} is damaged: {error}") from error


def fetch_step(stream: Stream, lineage: int, step: int) -> RecordedStep:
    """A committed step as Redis holds it. Raises `StreamError` if some of it is gone."""
    raw: Any = stream.redis.hget(stream.key("manifests"), str(step))
    digest: Any = stream.redis.hget(stream.key("versions"), str(step + 1))
    if raw is None or digest is None:
        raise StreamError(f"step {step} is gone from Redis, or was never committed")
    manifest = msgspec.json.decode(raw, type=Manifest)
    frames = [
        with_routed(stream, frame) if frame.group is not None and frame.group.routed else frame
        for frame in read_frames(stream, manifest.groups())
    ]
    for frame in frames:
        if frame.problem is not None:
            raise StreamError(f"step {step}: {frame.problem}")
    payloads = {frame.row.group: frame.payload for frame in frames}
    routed = {frame.row.group: frame.chunks for frame in frames if frame.chunks}
    return RecordedStep(lineage, step, digest.decode(), manifest, payloads, routed)


def describe_run(stream: Stream, nonce: str, rules: dict[str, str]) -> RecordedRun:
    """`run.json` of a run whose version 0 is committed."""
    config: Any = stream.redis.get(stream.key("config"))
    environment: Any = stream.redis.get(stream.key("environment"))
    start: Any = stream.redis.hget(stream.key("versions"), "0")
    return RecordedRun(
        run=stream.run,
        nonce=nonce,
        start_digest=start.decode(),
        rules={name: rules[name] for name in Rules.__struct_fields__},
        config=msgspec.Raw(config or b"{}"),
        environment=msgspec.json.decode(environment or b"{}", type=dict[str, str]),
    )


def _write(path: Path, content: bytes) -> None:
    """Writes a file, synced, under its name only once it is whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
