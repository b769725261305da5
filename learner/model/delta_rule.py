"""The three functions of flash-linear-attention that Megatron-Core's gated DeltaNet calls, in torch.

Same signatures and results; every one starts afresh at the sequence boundaries in `cu_seqlens`.
Sequences are packed: the first of the leading dimensions [1, T] is always 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from learner.model.context import positions

CHUNK = 64
"""Tokens between two updates of the recurrent state; shorter sequences use shorter chunks."""


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str,
    cu_seqlens: torch.Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, None]:
    """Depthwise causal convolution and SiLU of `x` [1, T, D] with `weight` [D, W]; the last tap is now.

    No state is taken in or handed out: `initial_state` and `output_final_state` are what a training
    forward passes.
    """
    assert (activation, initial_state, output_final_state) == ("silu", None, False)
    places = positions(cu_seqlens)
    total = x * weight[:, -1]
    for back in range(1, weight.size(1)):
        earlier = F.pad(x, (0, 0, back, 0))[:, : x.size(1)]
        inside = (places >= back).to(x.dtype)[:, None]
        total = total + earlier * inside * weight[:, -1 - back]
    return F.silu(total if bias is None else total + bias), None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule, chunk by chunk, in fp32.

    For each head and token t: S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - exp(g_t) S_(t-1)^T k_t))^T,
    o_t = S_t^T q_t / sqrt(K). `q`, `k` [1, T, H, K], `v` [1, T, H, V], `g`, `beta` [1, T, H]; returns
    o [1, T, H, V]. The chunked form is that of Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks".
    """
    assert (initial_state, output_final_state, use_qk_l2norm_in_kernel) == (None, False, False)
    chunks, dtype = _Chunks(cu_seqlens), v.dtype
    q, k, v, beta, g = (chunks.cut(x.squeeze(0).float()) for x in (q, k, v, beta, g))
    g = g.cumsum(dim=-1)  # [N, H, C]: log decay since the chunk began
    lower = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=g.device).tril()
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    k_beta = k * beta[..., None]
    # Each token's correction depends on those before it in its chunk: (I + strictly lower) u = rhs,
    # of which the solver reads only what is strictly lower.
    mixing = k_beta @ k.mT * decay
    right = torch.cat((v * beta[..., None], k_beta * g[..., None].exp()), dim=-1)
    solved = torch.linalg.solve_triangular(mixing, right, upper=False, unitriangular=True)
    values, carried = solved.split((v.size(-1), k.size(-1)), dim=-1)
    q = q * q.size(-1) ** -0.5
    inside = q @ k.mT * decay
    last = g[..., -1:]
    parts = (values, carried, inside, q * g[..., None].exp(), k * (last - g)[..., None].exp(), last.exp())
    return chunks.join(_recur(chunks, parts)).to(dtype)[None], None


def _recur(chunks: _Chunks, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Carry the state of each sequence from chunk to chunk; outputs [N, H, C, V] in chunk order."""
    values, carried = parts[0], parts[1]
    state = values.new_zeros(len(chunks.rounds[0]), values.size(1), carried.size(-1), values.size(-1))
    outputs = []
    for members in chunks.rounds:
        u, w, inside, q, k, last = (part.index_select(0, members) for part in parts)
        state = state[: len(members)]  # those with fewer chunks have ended
        u = u - w @ state
        outputs.append(q @ state + inside @ u)
        state = state * last[..., None] + k.mT @ u
    return torch.cat(outputs).index_select(0, torch.cat(chunks.rounds).argsort())


class _Chunks:
    """Every sequence cut into chunks of `size` tokens, the last one padded with zeros.

    Zeros change nothing: beta = 0 writes nothing into the state, and no real token reads them.
    """

    def __init__(self, cu_seqlens: torch.Tensor) -> None:
        lengths = torch.diff(cu_seqlens).long()
        self.size = min(CHUNK, int(lengths.max()))
        counts = (lengths + self.size - 1) // self.size
        first = counts.cumsum(0) - counts
        self.number = int(counts.sum())
        """N: chunks of all sequences."""
        self.slots = torch.repeat_interleave(first * self.size, lengths) + positions(cu_seqlens)
        """int64 [T]: where each token lies in the concatenation of all chunks."""
        order = counts.argsort(descending=True, stable=True)
        self.rounds = [first[order][counts[order] > index] + index for index in range(int(counts.max()))]
        """Chunks that are first, second, ... of their sequence; sequences with most chunks first."""

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, ...] to [N, H, C, ...]."""
        padded = x.new_zeros(self.number * self.size, *x.shape[1:]).index_copy(0, self.slots, x)
        return padded.unflatten(0, (self.number, self.size)).transpose(1, 2)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H, C, ...] back to [T, H, ...]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)
