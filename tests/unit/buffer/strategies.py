"""Hypothesis strategies for valid groups, and frames forged around any content."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import xxhash
from hypothesis import strategies as st

from buffer.frame import MAGIC
from buffer.schema import SCHEMA_VERSION, Group, Sample, Span, Version

TOKENS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LOGPROBS = st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = st.integers(0, 10**10 - 1)


def split(draw: st.DrawFn, total: int, smallest: int) -> list[int]:
    """Any run lengths of at least `smallest` that sum to `total`."""
    runs: list[int] = []
    while sum(runs) < total:
        runs.append(draw(st.integers(smallest, total - sum(runs))))
        if len(runs) > 8:
            runs.append(total - sum(runs))
    return [run for run in runs if run >= smallest]


@st.composite
def samples(draw: st.DrawFn, versions: int) -> Sample:
    """A sample whose spans index a table of `versions`; the answer may be empty."""
    prompt = draw(st.lists(TOKENS, min_size=1, max_size=6))
    answer = draw(st.lists(TOKENS, max_size=8))
    logprobs = draw(st.lists(LOGPROBS, min_size=len(answer), max_size=len(answer)))
    index = st.integers(0, versions - 1)
    return Sample(
        tokens=np.array(prompt + answer, np.int32),
        prompt_length=len(prompt),
        logprobs=np.array(logprobs, np.float32),
        loss_runs=split(draw, len(answer), 0),
        spans=[Span(length, draw(index)) for length in split(draw, len(answer), 1)],
        reward=draw(FLOATS),
        rewards=draw(st.dictionaries(st.text(max_size=5), FLOATS, max_size=3)),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """A group of 1 to 4 ragged samples and 1 to 3 versions."""
    versions = draw(
        st.lists(st.builds(Version, st.integers(0, 2**40), st.text(max_size=6)), min_size=1, max_size=3)
    )
    return Group(
        lineage=draw(NUMBERS),
        position=draw(NUMBERS),
        attempt=draw(NUMBERS),
        row=draw(NUMBERS),
        actor=draw(st.text(max_size=8)),
        actor_epoch=draw(st.integers(0, 2**31)),
        temperature=draw(st.floats(0.0, exclude_min=True, allow_infinity=False)),
        versions=versions,
        started=draw(FLOATS),
        finished=draw(FLOATS),
        samples=draw(st.lists(samples(len(versions)), min_size=1, max_size=4)),
    )


def assert_same(left: Any, right: Any) -> None:
    """Every field of two groups or samples is equal, arrays in dtype and bit for bit."""
    for field in type(left).__struct_fields__:
        first, second = getattr(left, field), getattr(right, field)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype
            assert first.tobytes() == second.tobytes()
        elif field == "samples":
            assert len(first) == len(second)
            for pair in zip(first, second, strict=True):
                assert_same(*pair)
        else:
            assert first == second


def frame_of(body: bytes, size: int, *, version: int = SCHEMA_VERSION, flags: int = 0) -> bytes:
    """A frame whose header and checksum fit what follows them, whatever that is."""
    return struct.pack("<4sHHIQ", MAGIC, version, flags, size, xxhash.xxh3_64_intdigest(body)) + body


def indexed(*parts: tuple[int, bytes]) -> bytes:
    """Nine parts behind their index, given as (raw size, stored bytes) each; those not given are empty."""
    nine = [*parts, *[(0, b"")] * (9 - len(parts))]
    sizes = [number for size, stored in nine for number in (size, len(stored))]
    return struct.pack("<18I", *sizes) + b"".join(stored for _, stored in nine)


def forged(meta: bytes, ints: list[int] | np.ndarray = (), floats: list[float] | np.ndarray = ()) -> bytes:
    """A frame that passes every check up to its meta."""
    parts = [(len(meta), meta)]
    for values, dtype in ((ints, "<i4"), (floats, "<f4")):
        planes = np.array(values, dtype).view(np.uint8).reshape(-1, 4).T
        parts += [(len(plane), plane.tobytes()) for plane in planes]
    return frame_of(indexed(*parts), sum(size for size, _ in parts))
