"""Softmax attention of packed sequences: gradients do not depend on what lies in free memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from learner.model.attention import PackedSequences
from learner.model.gpu import GpuBackend
from learner.model.world import join_world

LENGTHS = (1000, 333, 5, 64, 1, 700)


def litter() -> None:
    """Leave blocks of all sizes full of nan to the allocator."""
    sizes = [2**power for power in range(9, 27)] * 3
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in sizes]
    del blocks


def core(heads: int, groups: int, width: int) -> torch.nn.Module:
    join_world()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    return GpuBackend(width).core_attention()(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def reference(leaves: list[torch.Tensor]) -> torch.Tensor:
    """One sequence after another, in the precision of `leaves`."""
    found = []
    for q, k, v in zip(*(leaf.split(LENGTHS) for leaf in leaves), strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "values"),
    [(8, 2, 256, 256), (16, 2, 256, 256), (16, 8, 128, 128), (32, 4, 128, 128), (16, 16, 192, 128)],
)
def test_gradients_are_right_whatever_lies_in_free_memory(
    heads: int, groups: int, width: int, values: int
) -> None:
    """The last is DeepSeek-V3's latent attention; Megatron-Core widens its values with zeros."""
    attention = core(heads, groups, width)
    bounds = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    packed = PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )
    source = torch.Generator("cuda").manual_seed(0)
    worst = 0.0
    for turn in range(6):
        shapes = [(sum(LENGTHS), *ends) for ends in [(heads, width), (groups, width), (groups, values)]]
        leaves = [
            torch.randn(shape, generator=source, device="cuda").bfloat16().requires_grad_()
            for shape in shapes
        ]
        weights = torch.randn(sum(LENGTHS), heads * values, generator=source, device="cuda")
        exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad((reference(exact) * weights).sum(), exact)
        *rest, value = leaves
        value = F.pad(value, (0, width - values))
        output = attention(*rest, value, None, AttnMaskType.causal, packed_seq_params=packed)
        output = output.unflatten(1, (heads, width))[..., :values].flatten(1)
        litter()
        found = torch.autograd.grad((output.float() * weights).sum(), leaves)
        for name, got, right in zip("qkv", found, expected, strict=True):
            off = float((got.float() - right).norm() / right.norm())
            worst = max(worst, off)
            assert off < 0.02, f"turn {turn}: gradient of {name} is {off:.2g} off"
    print(f"\n{heads} heads in {groups} groups of {width}, {values}: gradients at most {worst:.4f} off")
