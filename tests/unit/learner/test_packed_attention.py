"""Attention makes its classes of lengths from bounds alone where nobody made them before, as on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from learner.model.attention import PackedAttention, PackedSequences

BOUNDS = torch.tensor([0, 5, 38, 40, 190], dtype=torch.int32)


def test_bounds_alone_are_enough() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    groups = ProcessGroupCollection(**vars(alone))
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    source = torch.Generator().manual_seed(0)
    query = torch.randn(190, 4, 16, generator=source)
    key, value = (torch.randn(190, 2, 16, generator=source) for _ in range(2))
    planned = PackedSequences.of(BOUNDS)
    bare = PackedSequences(qkv_format="thd", cu_seqlens_q=BOUNDS, cu_seqlens_kv=BOUNDS)
    expected = attention(query, key, value, None, packed_seq_params=planned)
    for _ in range(2):  # the second layer finds them there
        assert torch.equal(attention(query, key, value, None, packed_seq_params=bare), expected)
    assert len(bare.kinds) == len(planned.kinds) == 4
