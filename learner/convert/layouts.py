"""The order of rows in the two projections that Megatron-Core keeps fused.

Each function returns int64 [rows]: which row of the stacked Hugging Face tensors each row of the
Megatron-Core tensor is.
"""

from __future__ import annotations

import torch

from learner.model.shape import Attention, DeltaNet


def query_key_value(attention: Attention) -> torch.Tensor:
    """`linear_qkv` from q_proj, k_proj, v_proj.

    For each key-value group: its query heads, then their gates if there are any, its key, its value.
    Hugging Face keeps a head's gate right behind the head: [heads, query | gate, head_dim].
    """
    groups, width = attention.groups, attention.head_dim
    kinds = 2 if attention.gated else 1
    queries = torch.arange(attention.heads * kinds * width).view(groups, -1, kinds, width)
    queries = queries.transpose(1, 2).reshape(groups, -1)
    keys = queries.numel() + torch.arange(groups * width).view(groups, width)
    values = keys + keys.numel()
    return torch.cat((queries, keys, values), dim=1).flatten()


def delta_net_input(net: DeltaNet) -> torch.Tensor:
    """`in_proj` from in_proj_qkvz and in_proj_ba.

    Sections query, key, value, z, beta, alpha, each over all heads. Hugging Face interleaves them by
    key head: [query | key | its values | their z], and [its betas | its alphas].
    """
    heads, repeats = net.key_heads, net.value_heads // net.key_heads
    value = repeats * net.value_dim
    widths = [net.key_dim, net.key_dim, value, value]
    qkvz = torch.arange(heads * sum(widths)).view(heads, -1)
    ba = qkvz.numel() + torch.arange(2 * net.value_heads).view(heads, -1)
    sections = (*qkvz.split(widths, dim=1), *ba.split(repeats, dim=1))
    return torch.cat([section.flatten() for section in sections])
