"""Megatron-Core on a CPU: every stand-in it needs, in one place.

Megatron-Core asks for CUDA by name in a few lines that its CPU paths run through. Functions are
replaced, never modules, so that model, data parallelism and optimizer stay Megatron-Core's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.ssm.gated_delta_net import common, gdn
from megatron.core.tensor_parallel import random as tensor_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.overrides import TorchFunctionMode

from learner.model import delta_rule


class _NoStream:
    """A CUDA stream and its events where there are none: work on a CPU is in order already."""

    def record_event(self) -> _NoStream:
        """The event that the work so far is done, which it is."""
        return self

    def synchronize(self) -> None:
        """Wait for that event."""


class CudaMeansCpu(TorchFunctionMode):
    """Within it ``device="cuda"`` creates tensors on the CPU, whose types have CUDA's names.

    For constructors only: Megatron-Core's optimizers put a constant on "cuda", and the one that keeps fp32
    copies of bf16 weights knows them by "torch.cuda.BFloat16Tensor". A mode costs Python time on every
    operation, so no training runs inside it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call `func` with the device replaced."""
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return (
            result.replace("torch.", "torch.cuda.", 1)
            if func is torch.Tensor.type and len(args) == 1
            else result
        )


def stand_in_for_cuda() -> None:
    """Replace what Megatron-Core calls on a machine without CUDA; calling it again changes nothing."""
    # Rotary tables, gradient buffers and buckets are allocated on the current device.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # The gradient all-reduce and the experts' dispatcher use streams even when nothing overlaps.
    stream = _NoStream()
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = stream
    # What is computed again gets the random state that it had, though nothing here is random.
    tensor_random._get_cuda_rng_state = lambda **_: None
    tensor_random._set_cuda_rng_state = lambda state, **_: None
    # Some functions are compiled at their first call, for which a host needs a C++ compiler.
    torch.compiler.set_stance("force_eager")
    # Gated DeltaNet takes three functions from flash-linear-attention, which needs a GPU.
    common.HAVE_FLA = True
    common.l2norm = delta_rule.l2norm
    gdn.causal_conv1d = delta_rule.causal_conv1d
    gdn.chunk_gated_delta_rule = delta_rule.chunk_gated_delta_rule
    # The unfused rotary embedding of packed sequences runs a few kernels for every sequence.
    rope_utils._apply_rotary_pos_emb_thd = rotate_packed


def rotate_packed(
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Rotary embedding of packed heads `t` [T, heads, D] from angles `freqs` [longest, 1, 1, R <= D].

    Same values as Megatron-Core's `_apply_rotary_pos_emb_thd`, in one pass over all sequences.
    """
    lengths = torch.diff(cu_seqlens)
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    positions = torch.arange(t.size(0), device=t.device) - starts
    cos, sin = ((table(freqs) * mscale).flatten(1)[positions, None] for table in (torch.cos, torch.sin))
    rotated, rest = t[..., : cos.size(-1)], t[..., cos.size(-1) :]
    if mla_rotary_interleaved:  # DeepSeek's pairs are neighbours in the checkpoint
        rotated = torch.cat((rotated[..., ::2], rotated[..., 1::2]), dim=-1)
    half = rope_utils._rotate_half(rotated, rotary_interleaved)
    turned = rotated * cos.to(t.dtype) + half * sin.to(t.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned
