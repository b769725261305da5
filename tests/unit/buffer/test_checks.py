"""What is wrong with a group is said by field, on the way in and on the way out alike."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from buffer import codec
from buffer.codec import decode, encode
from buffer.errors import RecordError
from buffer.schema import Group, Span, Version, group_id
from tests.contract.harness import make_group


def _set(**changes: object) -> Callable[[Group], None]:
    def change(group: Group) -> None:
        for name, value in changes.items():
            setattr(group, name, value)

    return change


def _sample(**changes: object) -> Callable[[Group], None]:
    def change(group: Group) -> None:
        _set(**changes)(group.samples[1])  # type: ignore[arg-type]

    return change


def _ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


Fault = tuple[str, Callable[[Group], None], str]

FAULTS: list[Fault] = [
    ("lineage", _set(lineage=-1), "got -1, expected 0 or more"),
    ("position", _set(position=10**10), "got 10000000000"),
    ("attempt", _set(attempt=-2), "got -2"),
    ("row", _set(row=-1), "got -1"),
    ("temperature", _set(temperature=0.0), "got 0.0"),
    ("temperature", _set(temperature=float("nan")), "got nan"),
    ("temperature", _set(temperature=float("inf")), "got inf"),
    ("started", _set(started=float("nan")), "finite"),
    ("started", _set(finished=float("inf")), "finite"),
    ("versions", _set(versions=[]), "got none"),
    ("versions[0]", _set(versions=[Version(-1, "d")]), "got -1"),
    ("samples[1].prompt_length", _sample(prompt_length=0), "got 0 of 7 tokens"),
    ("samples[1].prompt_length", _sample(prompt_length=8), "got 8 of 7 tokens"),
    ("samples[1].tokens", _sample(tokens=_ids(1, 2, 3, 4, -5, 6, 7)), "got -5"),
    ("samples[1].logprobs", _sample(logprobs=np.zeros(3, np.float32)), "got 3, expected 4"),
    ("samples[1].logprobs", _sample(logprobs=np.array([0, np.nan, 0, 0], "f4")), "not finite"),
    ("samples[1].logprobs", _sample(logprobs=np.array([0, 0, -np.inf, 0], "f4")), "not finite"),
    ("samples[1].loss_runs", _sample(loss_runs=[3]), "expected runs that sum to 4"),
    ("samples[1].loss_runs", _sample(loss_runs=[5, -1]), "expected runs that sum to 4"),
    ("samples[1].spans", _sample(spans=[]), "expected a sum of 4"),
    ("samples[1].spans", _sample(spans=[Span(4, 0), Span(0, 0)]), "expected a sum of 4"),
    ("samples[1].spans", _sample(spans=[Span(5, 0), Span(-1, 0)]), "expected a sum of 4"),
    ("samples[1].spans", _sample(spans=[Span(4, 1)]), "outside the table of 1"),
    ("samples[1].spans", _sample(spans=[Span(4, -1)]), "outside the table of 1"),
    ("samples[1].reward", _sample(reward=float("nan")), "finite"),
    ("samples[1].reward", _sample(rewards={"format": float("inf")}), "finite"),
]
"""Field -> how it is broken, what the error says."""

UNWRITABLE: list[Fault] = [
    ("samples", _set(samples=[]), "got none"),
    ("samples[1].tokens", _sample(tokens=np.arange(7)), "got int64"),
    ("samples[1].tokens", _sample(tokens=np.zeros((7, 1), np.int32)), "2 dimensions"),
    ("samples[1].logprobs", _sample(logprobs=np.zeros(4)), "got float64"),
]
"""Faults that no frame can carry."""


def _name(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("field", "change", "says"), FAULTS + UNWRITABLE, ids=_name)
def test_a_fault_is_named(field: str, change: Callable[[Group], None], says: str) -> None:
    group = make_group(5)
    change(group)
    with pytest.raises(RecordError) as caught:
        encode(group)
    assert (caught.value.field, caught.value.group) == (field, group.id)
    assert says in caught.value.problem


@pytest.mark.parametrize(("field", "change", "says"), FAULTS, ids=_name)
def test_a_reader_trusts_no_writer(
    field: str, change: Callable[[Group], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(5)
    change(group)
    with monkeypatch.context() as patch:
        patch.setattr(codec, "_check_fields", lambda *_: None)
        patch.setattr(codec, "_check_values", lambda *_: None)
        frame = encode(group)
    with pytest.raises(RecordError) as caught:
        decode(frame, entry="3-1")
    assert (caught.value.field, caught.value.entry) == (field, "3-1")
    assert says in caught.value.problem


def test_only_arrays_and_plain_values_are_encoded() -> None:
    group = make_group()
    group.samples[0].reward = np.float32(1.0)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="cannot encode float32"):
        encode(group)


def test_ids_sort_as_their_numbers() -> None:
    numbers = [(0, 9, 0), (0, 9, 2), (0, 10, 0), (0, 123456789, 1), (1, 0, 0), (12, 0, 0)]
    assert sorted(group_id(*triple) for triple in numbers) == [group_id(*triple) for triple in numbers]


def test_a_group_knows_its_oldest_version_and_its_mask() -> None:
    group = make_group(versions=(7, 5, 6))
    assert group.version_min == 5
    sample = group.samples[0]
    sample.loss_runs = [0, 1, 3]
    assert sample.loss_mask().tolist() == [False, True, True, True]
    assert msgspec.structs.asdict(group)["samples"][0] is sample
