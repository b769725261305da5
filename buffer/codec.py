"""Groups to bytes and back.

The frame (`buffer.frame`) of a group has nine parts: its meta (msgpack), in which an array is only its
length; the four byte planes of all its int32 arrays, one behind the other, lowest bytes first; and those
of all its float32 arrays. Bytes of equal weight beside each other are what makes arrays compress, and
the noise in the low bytes of log-probabilities then costs no time. Decoding checks the frame, then types,
shapes, finiteness.

    >>> import numpy as np
    >>> from buffer.schema import Group, Sample, Span, Version
    >>> tokens, logprobs = np.array([5, 6, 7], "i4"), np.array([-0.5], "f4")
    >>> sample = Sample(tokens, 2, logprobs, [1], [Span(1, 0)], 1.0, {}, "stop")
    >>> frame = encode(Group(0, 41, 0, 3, "a", 1, 1.0, [Version(12, "9c")], 0.0, 0.4, [sample]))
    >>> decode(frame).samples[0].tokens.tolist()
    [5, 6, 7]
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from buffer.errors import RecordError
from buffer.frame import SIZE_LIMIT, Bytes, pack, unpack
from buffer.schema import Group, Sample

_DTYPES = (np.dtype("i4"), np.dtype("f4"))
_PLANES = 4


def encode(group: Group, *, limit: int = SIZE_LIMIT) -> bytes:
    """The frame of a group. Raises `RecordError` if the group is not valid or larger than `limit` bytes."""
    _check_fields(group, "?")
    arrays: dict[np.dtype, list[np.ndarray]] = {dtype: [] for dtype in _DTYPES}

    def length_of(value: Any) -> int:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"cannot encode {type(value).__name__}")
        arrays[value.dtype].append(value)
        return len(value)

    meta = msgspec.msgpack.encode(group, enc_hook=length_of)
    flat = {dtype: np.concatenate(arrays[dtype]) for dtype in _DTYPES}
    _check_values(group, flat, "?")
    parts: list[Bytes] = [meta, *_split(flat[_DTYPES[0]]), *_split(flat[_DTYPES[1]])]
    size = sum(map(len, parts))
    if size > limit:
        raise RecordError(f"got {size} bytes, the limit is {limit}", field="size", group=group.id)
    return pack(parts)


def decode(frame: bytes, *, entry: str = "?", limit: int = SIZE_LIMIT) -> Group:
    """The group of a frame; its arrays are read-only views of two buffers.

    Raises `RecordError` naming `entry`, the group id where it is known, and the field.
    """
    meta, *planes = unpack(frame, 1 + 2 * _PLANES, entry=entry, limit=limit)
    flat = {}
    for place, dtype in enumerate(_DTYPES):
        own = planes[_PLANES * place : _PLANES * (place + 1)]
        if len({len(plane) for plane in own}) > 1:
            problem = f"got {[len(plane) for plane in own]} bytes of {dtype.name}, expected equal ones"
            raise RecordError(problem, field="planes", entry=entry)
        flat[dtype] = _join(own).view(dtype)
        flat[dtype].flags.writeable = False
    group = _decode_meta(meta, flat, entry)
    _check_fields(group, entry)
    _check_values(group, flat, entry)
    return group


def _split(array: np.ndarray) -> list[memoryview]:
    """The four byte planes of an array of 32-bit numbers, lowest bytes first."""
    low, high = array.view(np.uint32).astype(np.uint16), (array.view(np.uint32) >> 16).astype(np.uint16)
    return [half.astype(np.uint8).data for half in (low, low >> 8, high, high >> 8)]


def _join(planes: list[Bytes]) -> np.ndarray:
    """The uint32 array of four byte planes of equal length."""
    first, second, third, fourth = (np.frombuffer(plane, np.uint8) for plane in planes)
    low, high = second.astype(np.uint16), fourth.astype(np.uint16)
    low <<= 8
    low |= first
    high <<= 8
    high |= third
    whole = high.astype(np.uint32)
    whole <<= 16
    whole |= low
    return whole


def _decode_meta(meta: Bytes, flat: dict[np.dtype, np.ndarray], entry: str) -> Group:
    """Arrays come in wire order: tokens, log-probabilities, tokens, ... each a slice of its plane block."""
    taken = dict.fromkeys(_DTYPES, 0)
    order = [_DTYPES[0], _DTYPES[1]]

    def take(_: type, length: Any) -> np.ndarray:
        dtype = order[0]
        order.reverse()
        begin = taken[dtype]
        if type(length) is not int or not 0 <= length <= len(flat[dtype]) - begin:
            raise ValueError(f"array length {length!r}, {len(flat[dtype]) - begin} left")
        taken[dtype] = begin + length
        return flat[dtype][begin : begin + length]

    try:
        group = msgspec.msgpack.Decoder(Group, dec_hook=take).decode(meta)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise RecordError(str(error) or type(error).__name__, field="meta", entry=entry) from error
    for dtype in _DTYPES:
        if taken[dtype] != len(flat[dtype]):
            problem = f"{len(flat[dtype]) - taken[dtype]} {dtype.name} values belong to no sample"
            raise RecordError(problem, field="planes", entry=entry, group=group.id)
    return group


def _check_fields(group: Group, entry: str) -> None:
    """What every valid group fulfils, whoever made it, but for the values in its arrays."""

    def require(holds: bool, field: str, problem: str) -> None:
        if not holds:
            raise RecordError(problem, field=field, entry=entry, group=group.id)

    for name in ("lineage", "position", "attempt", "row"):
        value = getattr(group, name)
        require(0 <= value < 10**10, name, f"got {value}, expected 0 or more")
    require(
        math.isfinite(group.temperature) and group.temperature > 0, "temperature", f"got {group.temperature}"
    )
    require(math.isfinite(group.started) and math.isfinite(group.finished), "started", "times must be finite")
    require(bool(group.versions), "versions", "got none, expected at least one")
    for index, version in enumerate(group.versions):
        require(version.number >= 0, f"versions[{index}]", f"got {version.number}, expected 0 or more")
    if (routed := group.routed) is not None:
        sizes = (routed.layers, routed.chosen, routed.chunks)
        require(min(sizes) > 0 and max(sizes) < 1 << 16, "routed", f"got {sizes}, expected 1 to 65535 each")
    require(bool(group.samples), "samples", "got none, expected at least one")
    for index, sample in enumerate(group.samples):
        problem = _sample_problem(sample, len(group.versions))
        if problem is not None:
            require(False, f"samples[{index}].{problem[0]}", problem[1])


def _sample_problem(sample: Sample, versions: int) -> tuple[str, str] | None:
    """(field, problem) of the first thing wrong with a sample, or None."""
    tokens, logprobs, answer = sample.tokens, sample.logprobs, sample.answer_length
    if tokens.dtype != _DTYPES[0] or tokens.ndim != 1:
        return "tokens", f"got {tokens.dtype} of {tokens.ndim} dimensions, expected int32 of one"
    if logprobs.dtype != _DTYPES[1] or logprobs.ndim != 1:
        return "logprobs", f"got {logprobs.dtype} of {logprobs.ndim} dimensions, expected float32 of one"
    if not 0 < sample.prompt_length <= len(tokens):
        return "prompt_length", f"got {sample.prompt_length} of {len(tokens)} tokens"
    if sample.routed is not None:
        return "routed", "got some, expected none in a record; `buffer.routed.detach` takes them out"
    if len(logprobs) != answer:
        return "logprobs", f"got {len(logprobs)}, expected {answer}, one an answer token"
    if min(sample.loss_runs, default=0) < 0 or sum(sample.loss_runs) != answer:
        return "loss_runs", f"got {sample.loss_runs[:8]}, expected runs that sum to {answer}"
    lengths = [span.length for span in sample.spans]
    if min(lengths, default=1) < 1 or sum(lengths) != answer:
        return "spans", f"got lengths {lengths[:8]}, expected a sum of {answer}"
    if any(not 0 <= span.version < versions for span in sample.spans):
        return "spans", f"got a version index outside the table of {versions}"
    if not all(map(math.isfinite, (sample.reward, *sample.rewards.values()))):
        return "reward", f"got {sample.reward} {sample.rewards}, expected finite numbers"
    return None


def _check_values(group: Group, flat: dict[np.dtype, np.ndarray], entry: str) -> None:
    """Token ids and log-probabilities, all samples' at once; a fault is then looked for sample by sample."""
    if flat[_DTYPES[0]].min() >= 0 and np.isfinite(flat[_DTYPES[1]]).all():
        return
    for index, sample in enumerate(group.samples):
        field, problem = "", ""
        if sample.tokens.min() < 0:
            field, problem = "tokens", f"got {sample.tokens.min()}, expected ids of 0 or more"
        elif not np.isfinite(sample.logprobs).all():
            field, problem = "logprobs", "got a value that is not finite"
        if field:
            raise RecordError(problem, field=f"samples[{index}].{field}", entry=entry, group=group.id)
