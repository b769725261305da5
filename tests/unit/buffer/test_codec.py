"""The codec: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from buffer.codec import decode, encode
from buffer.errors import RecordError
from buffer.frame import SIZE_LIMIT, pack, unpack
from buffer.schema import Group
from tests.contract.harness import make_group
from tests.unit.buffer.strategies import assert_same, forged, frame_of, groups, indexed

HEADER = 20
"""Bytes before the index of the parts."""


@given(groups())
def test_a_group_survives_the_round_trip(group: Group) -> None:
    assert_same(decode(encode(group)), group)


def test_groups_without_any_answer_survive() -> None:
    group = make_group()
    for sample in group.samples:
        sample.tokens, sample.logprobs = sample.tokens[:3], sample.logprobs[:0]
        sample.loss_runs, sample.spans = [], []
    assert_same(decode(encode(group)), group)


def test_a_compressed_part_has_a_checksum_of_its_own() -> None:
    frame = pack([bytes(1000)])
    assert zstandard.get_frame_parameters(frame[HEADER + 8 :]).has_checksum


@given(st.lists(st.one_of(st.binary(max_size=50), st.integers(0, 9000).map(bytes)), max_size=5))
def test_parts_survive_compressed_or_not(parts: list[bytes]) -> None:
    assert [bytes(part) for part in unpack(pack(parts), len(parts))] == parts


def test_only_what_shrinks_is_compressed() -> None:
    noise = np.random.default_rng(0).bytes(20_000)
    assert len(pack([noise])) == HEADER + 8 + len(noise)
    assert len(pack([noise + bytes(20_000)])) < HEADER + 8 + 20_100
    assert len(pack([bytes(20_000)])) < 100
    ends = bytes(1000) + noise + bytes(1000)
    assert len(pack([ends])) == HEADER + 8 + len(ends), "a part whose middle is noise is not tried"


def test_decoded_arrays_are_read_only_and_any_view_encodes() -> None:
    group = make_group(answer=6)
    group.samples[0].tokens = np.arange(18, dtype=np.int32)[::2]
    frame = encode(group)
    decoded = decode(memoryview(frame))  # type: ignore[arg-type]
    assert decoded.samples[0].tokens.tolist() == list(range(0, 18, 2))
    with pytest.raises(ValueError, match="read-only"):
        decoded.samples[0].tokens[0] = 1
    assert encode(decoded) == frame


def test_every_flipped_bit_is_noticed() -> None:
    frame = encode(make_group())
    for bit in range(len(frame) * 8):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError) as caught:
            decode(bytes(broken), entry="7-0")
        assert caught.value.entry == "7-0"


def test_every_truncation_and_extension_is_noticed() -> None:
    frame = encode(make_group())
    for length in range(len(frame)):
        with pytest.raises(RecordError):
            decode(frame[:length])
    for extra in (b"\0", frame):
        with pytest.raises(RecordError):
            decode(frame + extra)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for frame in (noise, b"SLIP" + noise, frame_of(noise, len(noise)), forged(noise)):
        with pytest.raises(RecordError):
            decode(frame)


def test_noise_behind_the_parts_is_refused_though_the_checksum_holds() -> None:
    frame = encode(make_group())
    (size,) = struct.unpack_from("<I", frame, 8)
    for extra in (b"\0", frame[HEADER:]):
        with pytest.raises(RecordError, match="parts: got"):
            decode(frame_of(frame[HEADER:] + extra, size))
    zeros = zstandard.compress(bytes(1000))
    for stored in (zeros + b"\0", zeros + zeros, zeros[:-1], b"\0" * 50):
        with pytest.raises(RecordError, match=r"zstd|size"):
            decode(frame_of(indexed((1000, stored)), 1000))


def test_a_wrong_magic_is_shown() -> None:
    with pytest.raises(RecordError, match="at entry 1-0: magic: got b'PLIS', expected b'SLIP'"):
        decode(b"PLIS" + encode(make_group())[4:], entry="1-0")


def test_another_schema_version_names_both() -> None:
    body = encode(make_group())[HEADER:]
    with pytest.raises(
        RecordError, match=r"got schema version 7 .*, this release reads 2; run actors and learner"
    ):
        decode(frame_of(body, 100, version=7))
    with pytest.raises(RecordError, match="flags 1"):
        decode(frame_of(body, 100, flags=1))


@dataclass
class Bomb:
    """A frame that claims more than it should, and what the error says."""

    frame: bytes
    says: str
    limit: int = SIZE_LIMIT


def _bombs() -> dict[str, Bomb]:
    huge = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    declared = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 99)
    return {
        "header over the limit": Bomb(
            frame_of(b"x", 512 << 20), "declares 536870912 bytes, the limit is 268435456"
        ),
        "index over the header": Bomb(frame_of(indexed((64 << 20, huge)), 100), "parts: got 67108864 bytes"),
        "zstd over the index": Bomb(
            frame_of(indexed((9999, huge)), 9999), "zstd declares 67108864 bytes, the index 9999"
        ),
        "zstd of a terabyte": Bomb(
            frame_of(indexed((9999, declared)), 9999), "zstd declares 1099511627776 bytes"
        ),
        "over the reader's limit": Bomb(
            frame_of(indexed((64 << 20, huge)), 64 << 20), "the limit is 1048576", limit=1 << 20
        ),
        "without a checksum": Bomb(frame_of(indexed((64 << 20, huge)), 64 << 20)[:-1], "checksum"),
        "zstd of unknown size": Bomb(frame_of(indexed((99, unsized)), 99), "zstd declares"),
        "stored over its size": Bomb(frame_of(indexed((5, b"123456")), 5), "zstd|size"),
    }


@pytest.mark.parametrize("name", list(_bombs()))
def test_a_bomb_is_refused_before_it_is_allocated(name: str) -> None:
    bomb = _bombs()[name]
    tracemalloc.start()
    with pytest.raises(RecordError, match=bomb.says):
        decode(bomb.frame, limit=bomb.limit)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_group_over_the_limit_is_not_encoded() -> None:
    with pytest.raises(RecordError, match="the limit is 100") as caught:
        encode(make_group(9), limit=100)
    assert (caught.value.field, caught.value.group) == ("size", "0000-0000000009-00")


def test_planes_of_unequal_length_are_refused() -> None:
    with pytest.raises(RecordError, match=r"planes: got \[4, 4, 4, 3\] bytes of int32"):
        decode(frame_of(indexed((1, b"m"), (4, b"1234"), (4, b"1234"), (4, b"1234"), (3, b"123")), 16))
    with pytest.raises(RecordError, match="got 5 bytes, expected the sizes of 9"):
        decode(frame_of(b"short", 5))


def _meta(group: Group, *path: object, value: object) -> bytes:
    """The group's meta with arrays as lengths and one value, at a path of indices, replaced."""
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(group, enc_hook=len))
    node = tree
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return msgspec.msgpack.encode(tree)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((0,), "Other", "Invalid value 'Other'"),
        ((1,), 1.5, r"Expected `int`, got `float` - at `\$\[1\]`"),
        ((11, 0, 0), 8, "prompt|tokens|planes|array length|belong"),
        ((11, 0, 0), -1, "array length -1"),
        ((11, 0, 0), 2**40, "array length"),
        ((11, 0, 0), [1], "array length"),
        ((11, 1, 2), 3, "belong to no sample"),
        ((11, 0, 2), "4", "array length '4'"),
        ((11,), [], "belong to no sample"),
        ((8,), [[1]], "at least length 2"),
        ((11, 0, 4), [[2**63, 0], [2**63, 0]], "spans"),
    ],
)
def test_a_meta_that_lies_is_refused(path: tuple[object, ...], value: object, says: str) -> None:
    group = make_group()
    tokens = np.concatenate([sample.tokens for sample in group.samples])
    logprobs = np.concatenate([sample.logprobs for sample in group.samples])
    assert_same(decode(forged(_meta(group, 1, value=0), tokens, logprobs)), group)
    with pytest.raises(RecordError, match=says):
        decode(forged(_meta(group, *path, value=value), tokens, logprobs))


@pytest.mark.parametrize("nest", [b"\x91", b"\x81\x01"], ids=["arrays", "maps"])
def test_deep_nesting_is_refused(nest: bytes) -> None:
    deep = nest * 100_000 + b"\x00"
    meta = _meta(make_group(), 1, value=0)
    assert meta[:1] == b"\x9d"
    # A reader skips fields it does not know, and must not run out of stack while it does.
    for forgery in (deep, b"\x9e" + meta[1:] + deep):
        with pytest.raises(RecordError, match="meta"):
            decode(forged(forgery, np.zeros(14), np.zeros(8)))


@pytest.mark.parametrize("size", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_giant_lengths_are_refused_at_once(size: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(RecordError):
        decode(forged(size))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def _answers(vocabulary: int) -> Group:
    """8 answers of 1,024 tokens: Zipf-like ids, mostly confident log-probabilities."""
    source = np.random.default_rng(0)
    group = make_group(size=8, answer=1024)
    for sample in group.samples:
        sample.tokens = np.minimum(source.zipf(1.3, 1027), vocabulary).astype(np.int32)
        sample.logprobs = -source.gamma(0.3, 1.0, 1024).astype(np.float32)
    return group


@pytest.mark.parametrize(("vocabulary", "share"), [(48, 0.6), (150_000, 0.66)])
def test_byte_planes_compress_what_plain_arrays_do_not(vocabulary: int, share: float) -> None:
    """Log-probabilities of random mantissas leave no more to gain: 24 of 32 bits of half the bytes."""
    group = _answers(vocabulary)
    arrays = [array for sample in group.samples for array in (sample.tokens, sample.logprobs)]
    raw = b"".join(array.tobytes() for array in arrays)
    size = len(encode(group))
    assert size < share * len(raw)
    assert size < 0.98 * len(zstandard.compress(raw, level=1))
