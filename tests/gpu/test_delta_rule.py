"""flash-linear-attention's gated delta rule at the widths of Qwen3-Next, against ours in torch."""

from __future__ import annotations

import torch

from learner.model import delta_rule

LENGTHS = (700, 5, 1, 330, 64, 900)
HEADS, WIDTH = 16, 128


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    """[1, T, ...] queries, keys, values, log decays and betas, all of a gradient; and their `cu_seqlens`."""
    source = torch.Generator("cuda").manual_seed(0)

    def drawn(*dims: int) -> torch.Tensor:
        return torch.randn(1, sum(LENGTHS), *dims, generator=source, device="cuda")

    q, k = (delta_rule.l2norm(drawn(HEADS, WIDTH)) for _ in range(2))
    decay = -drawn(HEADS).exp() * 0.1
    values = [q, k, drawn(HEADS, WIDTH), decay, drawn(HEADS).sigmoid()]
    # What bf16 holds, so that only the kernels round.
    leaves = [value.bfloat16().float().requires_grad_() for value in values]
    return leaves, torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()


def test_kernels_at_published_widths_equal_ours() -> None:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    leaves, bounds = inputs()
    weights = torch.randn(
        1, sum(LENGTHS), HEADS, WIDTH, generator=torch.Generator("cuda").manual_seed(1), device="cuda"
    )
    right, _ = delta_rule.chunk_gated_delta_rule(*leaves, cu_seqlens=bounds)
    expected = torch.autograd.grad((right * weights).sum(), leaves)
    q, k, v, g, beta = leaves
    found, _ = chunk_gated_delta_rule(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), g, beta.bfloat16(), cu_seqlens=bounds.long()
    )
    gradients = torch.autograd.grad((found.float() * weights).sum(), leaves)
    pairs = zip(("o", "dq", "dk", "dv", "dg", "dbeta"), (found, *gradients), (right, *expected), strict=True)
    off = {name: float((got.float() - want).norm() / want.norm()) for name, got, want in pairs}
    print(
        f"\ngated delta rule, {HEADS} heads of {WIDTH}:",
        *(f"{key} {value:.4f}" for key, value in off.items()),
    )
    assert max(off.values()) < 0.03, off
