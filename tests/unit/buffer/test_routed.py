"""Routed experts beside a record: whole there and back; nothing damaged, foreign or missing gets through."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import buffer.routed
from buffer.codec import decode, encode
from buffer.errors import RecordError
from buffer.frame import pack
from buffer.routed import attach, detach
from buffer.schema import Group, Routed, Sample, Span, Version


def make_group(lengths: tuple[int, ...] = (5, 9), layers: int = 3, chosen: int = 2, seed: int = 0) -> Group:
    """Samples of these many tokens, three of them prompt, with any experts of 512."""
    source = np.random.default_rng(seed)
    samples = [
        Sample(
            tokens=np.arange(length, dtype=np.int32),
            prompt_length=3,
            logprobs=np.full(length - 3, -0.5, np.float32),
            loss_runs=[length - 3],
            spans=[Span(length - 3, 0)] if length > 3 else [],
            reward=0.0,
            rewards={},
            finish_reason="stop",
            routed=source.integers(0, 512, (length - 1, layers, chosen)).astype(np.uint16),
        )
        for length in lengths
    ]
    return Group(0, seed, 0, 0, "a", 1, 1.0, [Version(0, "00")], 0.0, 1.0, samples)


def changed(group: Group, index: int, routed: np.ndarray | None) -> Group:
    samples = list(group.samples)
    samples[index] = msgspec.structs.replace(samples[index], routed=routed)
    return msgspec.structs.replace(group, samples=samples)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=5),
    layers=st.integers(1, 5),
    chosen=st.integers(1, 4),
    limit=st.integers(1, 400),
    seed=st.integers(0, 100),
)
def test_they_survive_the_way_there_and_back(
    lengths: list[int], layers: int, chosen: int, limit: int, seed: int
) -> None:
    group = make_group(tuple(lengths), layers, chosen, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer.routed, "CHUNK_BYTES", limit)
        bare, chunks = detach(group)
        rows = max(1, limit // (2 * layers * chosen))
        assert len(chunks) == -(-sum(length - 1 for length in lengths) // rows)
        again = attach(decode(encode(bare)), chunks)
    for sample, other in zip(group.samples, again.samples, strict=True):
        assert other.routed.dtype == np.uint16
        assert np.array_equal(sample.routed, other.routed)
        assert sample.routed.shape == other.routed.shape


def test_a_record_holds_the_reference_alone() -> None:
    group = make_group()
    bare, chunks = detach(group)
    assert (bare.routed, len(chunks)) == (Routed(3, 2, 1), 1)
    assert [sample.routed for sample in decode(encode(bare)).samples] == [None, None]
    with pytest.raises(RecordError, match=r"samples\[0\]\.routed: got some, expected none in a record"):
        encode(group)
    plain = changed(changed(group, 0, None), 1, None)
    assert detach(plain) == (plain, [])
    assert decode(encode(plain)).routed is None


def test_experts_that_lie_cost_little() -> None:
    """Of 512 experts nine bits are noise: the high byte's part is compressed."""
    bare, chunks = detach(make_group((2000, 2000), 4, 8))
    raw = 2 * 2 * 1999 * 4 * 8
    assert bare.routed == Routed(4, 8, 1)
    assert len(chunks[0]) < 0.6 * raw


def test_a_sample_without_an_answer_needs_none() -> None:
    group = changed(make_group((5, 3)), 1, None)
    assert attach(*detach(group)).samples[1].routed.tolist() == np.zeros((2, 3, 2)).tolist()


@pytest.mark.parametrize(
    ("index", "routed", "says"),
    [
        (1, None, r"samples\[1\].routed: got none, expected uint16 \[8, 3, 2\]"),
        (0, np.zeros((4, 3, 2), np.int32), r"samples\[0\].routed: got int32 \[4, 3, 2\], expected uint16"),
        (1, np.zeros((7, 3, 2), np.uint16), r"got uint16 \[7, 3, 2\], expected uint16 \[8, 3, 2\]"),
        (1, np.zeros((8, 2, 2), np.uint16), r"got uint16 \[8, 2, 2\], expected uint16 \[8, 3, 2\]"),
        (
            0,
            np.zeros((4, 3), np.uint16),
            r"got uint16 \[4, 3\], expected uint16 \[4, 3\]: tokens less 1, lay",
        ),
    ],
)
def test_what_an_engine_cannot_mean_is_refused(index: int, routed: np.ndarray | None, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        detach(changed(make_group(), index, routed))


def chunked(monkeypatch: pytest.MonkeyPatch) -> tuple[Group, list[bytes]]:
    """Twelve rows of 12 bytes each in chunks of 5."""
    monkeypatch.setattr(buffer.routed, "CHUNK_BYTES", 60)
    bare, chunks = detach(make_group())
    assert len(chunks) == 3
    return bare, chunks


def test_a_chunk_that_is_gone_is_a_payload_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, chunks = chunked(monkeypatch)
    with pytest.raises(RecordError, match=r"payload: chunk 1 of its routed experts is gone") as caught:
        attach(bare, [chunks[0], None, chunks[2]], entry="7-0")
    assert (caught.value.field, caught.value.entry, caught.value.group) == ("payload", "7-0", bare.id)


def test_every_flipped_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, chunks = chunked(monkeypatch)
    for place in range(len(chunks[1])):
        damaged = bytearray(chunks[1])
        damaged[place] ^= 1 << place % 8
        with pytest.raises(RecordError, match=r"routed\[1\]"):
            attach(bare, [chunks[0], bytes(damaged), chunks[2]])


def test_chunks_out_of_place_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, chunks = chunked(monkeypatch)
    _, foreign = detach(make_group(seed=1))
    for wrong in ([chunks[1], chunks[0], chunks[2]], [foreign[0], chunks[1], chunks[2]]):
        with pytest.raises(RecordError, match=r"routed\[0\]: it is another group's or out of place"):
            attach(bare, wrong)
    for wrong in (chunks[:2], [*chunks, chunks[0]], []):
        with pytest.raises(RecordError, match=r"routed.chunks: got \d chunks, 3 named, expected 3"):
            attach(bare, wrong)
    more = msgspec.structs.replace(bare, routed=Routed(3, 2, 4))
    with pytest.raises(RecordError, match="got 3 chunks, 4 named, expected 3"):
        attach(more, chunks)
    with pytest.raises(RecordError, match="routed: the record has none; actor a did not return them"):
        attach(msgspec.structs.replace(bare, routed=None), [])


def test_a_chunk_of_another_size_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, chunks = chunked(monkeypatch)
    label = msgspec.msgpack.encode((bare.id, 0))
    for sizes, says in (((29, 30), "got .*29, 30.* expected 30 each"), ((1 << 20, 1 << 20), "the limit is")):
        forged = pack([label, *map(bytes, sizes)])
        with pytest.raises(RecordError, match=says):
            attach(bare, [forged, *chunks[1:]])


@pytest.mark.parametrize("sizes", [(0, 2, 1), (3, 1 << 16, 1), (3, 2, -1)])
def test_a_reference_that_cannot_be_is_refused(sizes: tuple[int, int, int]) -> None:
    bare, _ = detach(make_group())
    with pytest.raises(RecordError, match="routed: got"):
        encode(msgspec.structs.replace(bare, routed=Routed(*sizes)))
