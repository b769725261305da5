"""Joined copies fill an engine's stacked experts, from the GPU's memory and from the host's, cast."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
import torch

from weightsync.plan import Plan, watch

EXPERTS, HIDDEN, INNER = 128, 2048, 768
"""Of a layer of Qwen3-30B-A3B."""
PARTS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


class Stacked(torch.nn.Module):
    """The experts of a layer as an engine keeps them, in bf16: gate and up in one tensor, and all experts."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"w13": (2 * INNER, HIDDEN), "w2": (HIDDEN, INNER)}.items():
            empty = torch.zeros(EXPERTS, *shape, dtype=torch.bfloat16, device="cuda")
            self.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))

    def place(self, name: str) -> torch.Tensor:
        """Where an exported tensor goes."""
        expert, part = name.split(".")
        if part == "down_proj":
            return self.w2[int(expert)]
        return self.w13[int(expert)][:INNER] if part == "gate_proj" else self.w13[int(expert)][INNER:]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """By names, one expert's matrix after another."""
        for name, tensor in weights:
            self.place(name).copy_(tensor)


def version(seed: int, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image of fp32 tensors, uint8 [bytes], and its views by name."""
    count = EXPERTS * 3 * INNER * HIDDEN
    draw = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(count, generator=draw, device="cuda").to(device)
    views, at = {}, 0
    for expert in range(EXPERTS):
        for part, shape in PARTS.items():
            views[f"{expert}.{part}"] = values[at : at + INNER * HIDDEN].view(shape)
            at += INNER * HIDDEN
    return values.view(torch.uint8), views


def copied(plan: Plan, image: torch.Tensor) -> float:
    """Seconds of the plan's copies."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    plan.copy(image)
    torch.cuda.synchronize()
    return time.perf_counter() - began


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_joined_copies_fill_stacked_experts(device: str) -> None:
    model = Stacked()
    first, views = version(0, device)
    plan = watch(model, "layout", first, views, model.load_weights)
    assert plan.reason == ""
    assert len(plan.copies) <= 8
    image, views = version(1, device)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    seconds = copied(plan, image)
    print(
        f"\n{3 * EXPERTS} matrices in {len(plan.copies)} copies from {device}: {seconds * 1e3:.1f} ms", end=""
    )
    for name, tensor in views.items():
        assert torch.equal(model.place(name), tensor.to("cuda", torch.bfloat16)), name
    assert plan.unequal(image) == 0
    model.place("77.up_proj")[5, 6] += 1
    assert plan.unequal(image) == 1
