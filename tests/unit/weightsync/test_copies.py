"""Fewer copies fill the same places with the same values, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from weightsync import copies as module
from weightsync.copies import Copy, merged

ROWS, WIDTH = 3, 4


def image_of(size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def copy_of(target: torch.Tensor, offset: int, *, transposed: bool = False) -> Copy:
    """From int16 words at `offset`, contiguous or transposed."""
    size = tuple(target.shape)
    stride = (1, size[0]) if transposed else (size[1], 1)
    return Copy(target, offset, size, stride, torch.int16)


def experts(order: list[int], *, transposed: bool = False) -> tuple[list[torch.Tensor], list[Copy]]:
    """Stacked tensors of experts whose gate, up and down projections are exported in some order."""
    count, block = len(order), ROWS * WIDTH
    stacked = torch.zeros(count, 2 * ROWS, WIDTH, dtype=torch.int32)
    down = torch.zeros(count, ROWS, WIDTH, dtype=torch.int32)
    copies = []
    for place, expert in enumerate(order):
        start = 2 * (7 + 3 * block * place)
        targets = (stacked[expert, :ROWS], stacked[expert, ROWS:], down[expert])
        copies += [
            copy_of(target, start + 2 * block * part, transposed=transposed)
            for part, target in enumerate(targets)
        ]
    return [stacked, down], copies


def run(copies: list[Copy], tensors: list[torch.Tensor], image: torch.Tensor) -> list[torch.Tensor]:
    """What copies make of empty tensors."""
    for tensor in tensors:
        tensor.fill_(-1)
    for copy in copies:
        copy.target.copy_(copy.source(image))
    return [tensor.clone() for tensor in tensors]


def agree(copies: list[Copy], tensors: list[torch.Tensor]) -> int:
    """How many copies do the same as these; another image each time."""
    fewer = merged(copies)
    for seed in range(3):
        image = image_of(4096, seed)
        wanted, got = run(copies, tensors, image), run(fewer, tensors, image)
        assert all(torch.equal(one, other) for one, other in zip(wanted, got, strict=True))
    return len(fewer)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_experts_of_a_layer_are_one_copy_a_stacked_tensor(transposed: bool) -> None:
    tensors, copies = experts(list(range(8)), transposed=transposed)
    assert (len(copies), agree(copies, tensors)) == (24, 2)


def test_the_order_of_the_copies_does_not_matter() -> None:
    tensors, copies = experts(list(range(8)))
    random.Random(1).shuffle(copies)
    assert agree(copies, tensors) == 2


@pytest.mark.parametrize("seed", range(20))
def test_uneven_steps_are_taken_as_they_are(seed: int) -> None:
    order = list(range(6))
    random.Random(seed).shuffle(order)
    tensors, copies = experts(order)
    assert 2 <= agree(copies, tensors) <= 18


def test_other_shapes_types_and_strides_stay_apart() -> None:
    tensor = torch.zeros(4, WIDTH, dtype=torch.int32)
    same = [copy_of(tensor[row : row + 1], 8 * row) for row in range(4)]
    assert agree(same, [tensor]) == 1
    other = Copy(same[1].target, 8, (1, WIDTH), (WIDTH, 1), torch.int8)
    assert agree([same[0], other, *same[2:]], [tensor]) == 3
    strided = Copy(same[1].target, 8, (1, WIDTH), (WIDTH, 2), torch.int16)
    assert agree([same[0], strided, *same[2:]], [tensor]) == 3
    wide = [copy_of(tensor[:1], 0), copy_of(tensor[1:3], 8), copy_of(tensor[3:], 24)]
    assert agree(wide, [tensor]) == 3


def test_sources_may_overlap_but_do_not_go_back() -> None:
    tensor = torch.zeros(4, WIDTH, dtype=torch.int32)
    assert agree([copy_of(tensor[row : row + 1], 2 * row) for row in range(4)], [tensor]) == 1
    assert agree([copy_of(tensor[row : row + 1], 64 - 8 * row) for row in range(4)], [tensor]) == 4
    assert agree([copy_of(tensor[row : row + 1], 16) for row in range(4)], [tensor]) == 4


def overlapping(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[0:2], tensor[1:3], tensor[2:4]]


def columns(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[:, 0:2], tensor[:, 2:4]]


def gaps(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[::3], tensor[2:4]]


@pytest.mark.parametrize("places", [overlapping, columns, gaps])
def test_places_that_overlap_or_have_gaps_keep_their_order(
    places: Callable[[torch.Tensor], list[torch.Tensor]],
) -> None:
    tensor = torch.zeros(4, WIDTH, dtype=torch.int32)
    copies = [copy_of(target, 16 * number) for number, target in enumerate(places(tensor))]
    copies.reverse()
    assert merged(copies) == copies
    assert agree(copies, [tensor]) == len(copies)


def test_a_copy_grows_to_its_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 4 * 2 * 2 * ROWS * WIDTH)  # two experts' gate and up in int32
    tensors, copies = experts(list(range(8)))
    assert agree(copies, tensors) == 4 + 2
    assert all(copy.target.nbytes <= module.LARGEST for copy in merged(copies))
