"""A version's digest stands for its exported tensors: every bit, name, shape and their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsync.manifest import Manifest, TensorEntry, parse_label

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def _weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(3), "empty": torch.zeros(0, 4)}


def test_a_manifest_lists_the_tensors_in_order() -> None:
    manifest = Manifest.of(3, _weights())
    assert manifest.tensors == [
        TensorEntry("a.weight", "float32", (2, 3)),
        TensorEntry("b.bias", "float32", (3,)),
        TensorEntry("empty", "float32", (0, 4)),
    ]
    assert manifest.label == f"3:{manifest.digest}"
    assert len(manifest.digest) == 32


def test_equal_tensors_have_one_digest_whatever_the_version() -> None:
    assert Manifest.of(3, _weights()).digest == Manifest.of(4, _weights()).digest


@given(st.sampled_from(["a.weight", "b.bias"]), st.integers(0, 2), st.integers(0, 31))
def test_every_bit_counts(name: str, index: int, bit: int) -> None:
    changed = _weights()
    changed[name].view(torch.int32).view(-1)[index] ^= torch.tensor(1 << bit).to(torch.int32)
    assert Manifest.of(0, changed).digest != Manifest.of(0, _weights()).digest


def test_names_shapes_dtypes_order_and_presence_count() -> None:
    base = _weights()
    a, b, empty = base.items()
    others = [
        dict([b, a, empty]),
        dict([a, b]),
        {**base, "more": torch.zeros(0)},
        {"a.other": a[1], **dict([b, empty])},
        {**base, "a.weight": a[1].reshape(3, 2)},
        {**base, "a.weight": a[1].view(torch.int32)},
        {**base, "a.weight": a[1].T.contiguous()},
    ]
    digests = {Manifest.of(0, weights).digest for weights in [base, *others]}
    assert len(digests) == 1 + len(others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_is_exported_has_a_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(4).to(dtype)
    manifest = Manifest.of(0, {"x": tensor})
    assert manifest.tensors[0].dtype == str(dtype).removeprefix("torch.")
    assert manifest.digest != Manifest.of(0, {"x": tensor + 1}).digest


@given(st.integers(0, 10**9), st.text("0123456789abcdef", min_size=1, max_size=32))
def test_a_label_is_read_back(version: int, digest: str) -> None:
    assert parse_label(Manifest(version, digest, []).label) == (version, digest)


@pytest.mark.parametrize("label", ["", "default", "12", "-1:9c", "x:9c", ":9c", "1.0:9c", " 1:9c"])
def test_anything_else_is_no_label(label: str) -> None:
    with pytest.raises(ValueError, match="expected <version>:<digest>"):
        parse_label(label)
