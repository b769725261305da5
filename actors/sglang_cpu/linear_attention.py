"""Gated DeltaNet over SGLang's pools of recurrent states, the whole batch at once.

Stands in for SGLang's `GDNAttnBackend`, whose kernels are Triton: the model, the pools and the scheduler
are SGLang's own. A ragged batch is padded, as in `attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase

from actors.sglang_cpu.attention import padded
from actors.sglang_cpu.delta_rule import as_heads, convolve, delta_rule, gates, step

if TYPE_CHECKING:
    from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class GatedDeltaNetAttention(MambaAttnBackendBase):
    """Decode and (chunked) prefill of gated DeltaNet layers.

    Prefix caching of recurrent states and speculative decoding are refused.
    """

    needs_cpu_seq_lens = False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Look up each sequence's row in the pools and lay out the batch, once for all layers."""
        super().init_forward_metadata(forward_batch)
        if self.forward_metadata.has_mamba_track_mask or forward_batch.forward_mode.is_target_verify():
            raise ValueError("no prefix cache and no speculative decoding of recurrent states on a CPU")
        self.slots = self.forward_metadata.mamba_cache_indices.long()
        """int64 [B]: row of each sequence in the pools."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            self.counts = forward_batch.extend_seq_lens.long()
            self.rows, self.real = padded(self.counts)
            self.begun = (forward_batch.extend_prefix_lens > 0)[:, None, None]
            """bool [B, 1, 1]: whether the pools hold the sequence's beginning."""

    def forward_decode(
        self,
        layer: RadixLinearAttention,
        forward_batch: ForwardBatch,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        **_: object,
    ) -> torch.Tensor:
        """One new token a sequence: mixed_qkv [B, D], a and b [B, HV]; returns [B, HV, V]."""
        past, states = self._pools(layer)
        one = torch.ones_like(self.slots)
        x, past[self.slots] = convolve(
            mixed_qkv[:, None], layer.conv_weights, layer.bias, past[self.slots], one
        )
        tokens = as_heads(x[:, 0], layer.num_k_heads, layer.num_v_heads, layer.head_k_dim)
        g, beta = gates(a, b, layer.A_log, layer.dt_bias)
        out, states[self.slots] = step(tokens, g, beta, states[self.slots])
        return out.to(mixed_qkv.dtype)

    def forward_extend(
        self,
        layer: RadixLinearAttention,
        forward_batch: ForwardBatch,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        **_: object,
    ) -> torch.Tensor:
        """Several new tokens a sequence: mixed_qkv [N, D], a and b [N, HV]; returns [N, HV, V]."""
        past, states = self._pools(layer)
        before = past[self.slots] * self.begun
        x, past[self.slots] = convolve(
            mixed_qkv[self.rows], layer.conv_weights, layer.bias, before, self.counts
        )
        tokens = as_heads(x, layer.num_k_heads, layer.num_v_heads, layer.head_k_dim)
        g, beta = (gate[self.rows] * self.real[..., None] for gate in gates(a, b, layer.A_log, layer.dt_bias))
        state = states[self.slots] * self.begun[..., None]
        out, states[self.slots] = delta_rule(tokens, g, beta, state)
        return out[self.real].to(mixed_qkv.dtype)

    def _pools(self, layer: RadixLinearAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's pools: convolution inputs [slots, D, W - 1] and states [slots, HV, V, K]."""
        if layer.activation != "silu":
            raise ValueError(f"layer {layer.layer_id}: got activation {layer.activation}, expected silu")
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        return cache.conv[0], cache.temporal
