"""Qwen3-Next's Triton kernels of SGLang in torch; gated DeltaNet over padded batches and with states.

For each head and token t, with a state S [V, K] that a sequence carries from call to call::

    S_t = exp(g_t) S_(t-1) + beta_t (v_t - exp(g_t) S_(t-1) k_t) k_t^T        o_t = S_t q_t / sqrt(K)

(Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks"). Everything is computed in fp32.
Sizes: B sequences, T tokens at most in one of them, H key heads, HV value heads, K and V their widths,
D = 2 H K + HV V channels of the convolution, W its taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK = 64
"""Tokens between two updates of the state in `delta_rule`; shorter batches use shorter chunks."""


class Heads(NamedTuple):
    """Tokens as heads: q and k normalised and repeated for each value head, q divided by sqrt(K)."""

    q: torch.Tensor
    """[..., HV, K]."""
    k: torch.Tensor
    """[..., HV, K]."""
    v: torch.Tensor
    """[..., HV, V]."""


def split_projections(
    qkvz: torch.Tensor, ba: torch.Tensor, heads: int, value_heads: int, key_dim: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the two input projections hold; stands in for SGLang's `fused_qkvzba_split_reshape_cat`.

    The rows of both go by key head: ``q | k | v | z`` and ``b | a``, with HV / H value heads each.

    Returns:
        qkv [N, D] with all q, then all k, then all v; z [N, HV, V]; b and a [N, HV].
    """
    each = value_heads // heads
    parts = (key_dim, key_dim, each * value_dim, each * value_dim)
    q, k, v, z = qkvz.unflatten(-1, (heads, -1)).split(parts, dim=-1)
    b, a = ba.unflatten(-1, (heads, -1)).split(each, dim=-1)
    mixed = torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)
    return mixed, z.reshape(-1, value_heads, value_dim), b.flatten(1), a.flatten(1)


def gated_rms_norm(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    bias: None,
    activation: str,
    *,
    eps: float,
    **_: object,
) -> torch.Tensor:
    """RMS norm of `x` [..., V] times SiLU of `g` [..., V]; stands in for SGLang's `rms_norm_gated`."""
    if bias is not None or activation not in ("silu", "swish"):
        raise ValueError(f"the output gate is {activation} with bias {bias}, expected silu without one")
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight
    return (normed * F.silu(g.float())).to(x.dtype)


def add_gated(x: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, routed: torch.Tensor) -> None:
    """Add the shared expert's output [N, X] times sigmoid(x gate) to `routed` [N, X], in place.

    `x` [N, X] is what the experts were given, `gate` [X]; stands in for `fused_gate_sigmoid_mul_add`.
    """
    routed += (x @ gate).sigmoid()[:, None] * shared


def gates(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), in fp32; all [..., HV]."""
    return -a_log.float().exp() * F.softplus(a.float() + dt_bias.float()), b.float().sigmoid()


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution and SiLU over a batch padded at the end.

    Args:
        x: [B, T, D], the new tokens.
        weight: [D, W]; the last tap is now.
        bias: [D] or None.
        past: [B, D, W - 1], the inputs before them; zeros at the start of a sequence.
        counts: int64 [B], how many of the T are real.

    Returns:
        [B, T, D], and the past [B, D, W - 1] of what follows the real tokens.
    """
    whole = torch.cat((past.to(x.dtype), x.mT), dim=-1)
    out = F.conv1d(whole, weight[:, None].to(x.dtype), bias, groups=whole.shape[1])
    taps = counts[:, None] + torch.arange(past.shape[-1])
    later = whole.gather(-1, taps[:, None].expand(-1, whole.shape[1], -1))
    return F.silu(out).mT, later


def as_heads(x: torch.Tensor, heads: int, value_heads: int, key_dim: int) -> Heads:
    """Channels [..., D], as `convolve` gives them, cut into heads."""
    keys = heads * key_dim
    q, k, v = x.float().split((keys, keys, x.shape[-1] - 2 * keys), dim=-1)
    q, k = (_unit(part.unflatten(-1, (heads, key_dim))) for part in (q, k))
    q, k = (part.repeat_interleave(value_heads // heads, dim=-2) for part in (q, k))
    return Heads(q * key_dim**-0.5, k, v.unflatten(-1, (value_heads, -1)))


def step(
    tokens: Heads, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a sequence: `tokens` of [B, HV, ...], `g`, `beta` [B, HV], `state` [B, HV, V, K].

    Returns o [B, HV, V] and the new state.
    """
    k, q = tokens.k[..., None], tokens.q[..., None]
    state = state * g.exp()[..., None, None]
    written = beta[..., None, None] * (tokens.v[..., None] - state @ k)
    state = state + written @ k.mT
    return (state @ q).squeeze(-1), state


def delta_rule(
    tokens: Heads, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Many tokens a sequence, chunk by chunk: `tokens` of [B, T, HV, ...], `g`, `beta` [B, T, HV],
    `state` [B, HV, V, K].

    Where a batch is padded, `g` and `beta` are 0: that neither decays the state nor writes into it.
    Returns o [B, T, HV, V] and the new state.
    """
    length = g.shape[1]
    size = min(CHUNK, length)
    q, k, v, g, beta = (_cut(x, size) for x in (*tokens, g[..., None], beta[..., None]))
    total = g.cumsum(dim=-2)  # [B, HV, chunks, C, 1]: log decay since the chunk began
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    decay = (total - total.mT).masked_fill(~lower, -torch.inf).exp()
    # What a token writes depends on what those before it in its chunk wrote: (I + strictly lower) u = rhs,
    # of which the solver reads only what is strictly lower.
    k_beta = k * beta
    right = torch.cat((v * beta, k_beta * total.exp()), dim=-1)
    solved = torch.linalg.solve_triangular(k_beta @ k.mT * decay, right, upper=False, unitriangular=True)
    values, carried = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    inside = q @ k.mT * decay
    last = total[..., -1:, :]
    parts = (values, carried, inside, q * total.exp(), k * (last - total).exp(), last.exp())
    outputs = []
    for u, w, near, far, keys, faded in zip(*(part.unbind(2) for part in parts), strict=True):
        written = u - w @ state.mT
        outputs.append(far @ state.mT + near @ written)
        state = state * faded + written.mT @ keys
    return torch.cat(outputs, dim=2).transpose(1, 2)[:, :length], state


def _cut(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, HV, X] as chunks [B, HV, chunks, size, X], the last one padded with zeros."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return padded.transpose(1, 2).unflatten(2, (-1, size))


def _unit(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)
