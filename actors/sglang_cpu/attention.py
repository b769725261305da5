"""Attention over SGLang's paged key-value cache as one masked SDPA a layer for the whole batch.

SGLang's `torch_native` backend loops over the sequences in Python. With the short answers of many
small requests that loop is what a forward pass costs, so here the ragged batch is padded: keys and
values are gathered to [B, L] and the padding is masked. Everything that depends only on the batch
(which slots, which mask) is computed once a forward pass, not once a layer. Measured on one core with
groups of 16 samples of 5 tokens, 8 groups in flight, 2 layers: 43 groups/s against 8 with the loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class Layout(NamedTuple):
    """How the ragged batch of one forward pass lies in padded tensors. B sequences, T new tokens at
    most in one of them, L tokens in all at most."""

    slots: torch.Tensor
    """int64 [B, L]: cache row of each token; padding points at the sequence's first row."""
    rows: torch.Tensor | None
    """int64 [B, T]: row of the query tensor for each new token; None in decode, where T = 1."""
    real: torch.Tensor | None
    """bool [B, T]: which of them exist; None in decode."""
    mask: torch.Tensor
    """bool [B, 1, T or 1, L]: which tokens a new token may see."""


def padded(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A ragged batch of `counts` [B] tokens, which lie one after the other, as [B, T]: the row of each
    token, int64, where padding points at the sequence's first, and which tokens exist, bool."""
    new = torch.arange(int(counts.max()))
    real = new < counts[:, None]
    first = (counts.cumsum(0) - counts)[:, None]
    return torch.where(real, first + new, first), real


class BatchedAttention(AttentionBackend):
    """Causal self-attention, multi-head or grouped-query, for decode and (chunked) prefill.

    Sliding windows, cross attention and soft caps are refused: no model of ours has them on a CPU.
    """

    def __init__(self, runner: ModelRunner) -> None:
        """Keep the server's pools; `runner` is SGLang's model runner."""
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.layout: Layout
        """Of the batch under way; SGLang sets it before the first layer."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Lay out the batch, once for all layers."""
        lengths = forward_batch.seq_lens
        seen = torch.arange(int(lengths.max()))
        slots = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, : len(seen)].long()
        exists = seen < lengths[:, None]
        slots = torch.where(exists, slots, slots[:, :1])
        if forward_batch.forward_mode.is_decode():
            self.layout = Layout(slots, None, None, exists[:, None, None, :])
            return
        counts = forward_batch.extend_seq_lens
        rows, real = padded(counts)
        position = (lengths - counts)[:, None] + torch.arange(rows.shape[1])
        mask = seen <= position[:, :, None]
        self.layout = Layout(slots, rows, real, mask[:, None])

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """One new token a sequence. q [B, H*D], k and v [B, Hkv*D] or None; returns [B, H*D]."""
        self._save(k, v, layer, forward_batch, save_kv_cache)
        groups = layer.tp_q_head_num // layer.tp_k_head_num
        query = q.view(-1, layer.tp_k_head_num, groups, layer.qk_head_dim)
        return self._attend(query, self.layout.mask, layer).reshape(q.shape[0], -1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Several new tokens a sequence. q [N, H*D], k and v [N, Hkv*D] or None; returns [N, H*D]."""
        self._save(k, v, layer, forward_batch, save_kv_cache)
        heads, groups = layer.tp_k_head_num, layer.tp_q_head_num // layer.tp_k_head_num
        rows, real = self.layout.rows, self.layout.real
        assert rows is not None
        assert real is not None
        batch, length = rows.shape
        query = q.view(-1, heads, groups, layer.qk_head_dim)[rows]
        query = query.permute(0, 2, 3, 1, 4).reshape(batch, heads, groups * length, -1)
        out = self._attend(query, self.layout.mask.repeat(1, 1, groups, 1), layer)
        out = out.view(batch, heads, groups, length, -1).permute(0, 3, 1, 2, 4)
        return out[real].reshape(q.shape[0], -1)

    def support_triton(self) -> bool:
        """There is no Triton on a CPU."""
        return False

    def _save(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save: bool,
    ) -> None:
        """Write the new keys and values into the cache, after refusing layers we would get wrong."""
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            raise ValueError(f"layer {layer.layer_id} is not causal self-attention")
        if layer.sliding_window_size > -1 or layer.logit_cap > 0:
            raise ValueError(f"layer {layer.layer_id} has a sliding window or a logit cap")
        if save and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)

    def _attend(self, query: torch.Tensor, mask: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """SDPA of query [B, Hkv, Q, D] with the cached keys and values, [B, Hkv, Q, Dv]."""
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)[self.layout.slots].transpose(1, 2)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)[self.layout.slots].transpose(1, 2)
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=layer.scaling)
