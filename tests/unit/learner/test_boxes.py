"""Boxes are exactly the elements of a run, in order, and few."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.checkpoint.boxes import boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shape=SHAPES, data=st.data())
def test_boxes_are_the_run_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = torch.Size(shape).numel()
    low = data.draw(st.integers(0, count))
    high = data.draw(st.integers(low, count))
    numbers = torch.arange(count).view(shape)
    found = []
    parts = list(boxes(shape, low, high))
    for start, size in parts:
        part = numbers
        for dim, (begin, length) in enumerate(zip(start, size, strict=True)):
            assert length > 0
            part = part.narrow(dim, begin, length)
        found += part.flatten().tolist()
    assert found == list(range(low, high))
    assert len(parts) <= 2 * len(shape) - 1


def test_a_whole_tensor_is_one_box_and_a_run_of_a_matrix_three() -> None:
    assert list(boxes((4, 3), 0, 12)) == [((0, 0), (4, 3))]
    assert list(boxes((4, 3), 2, 10)) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    assert list(boxes((4, 3), 4, 5)) == [((1, 1), (1, 1))]
    assert list(boxes((7,), 2, 2)) == []
