"""Megatron-Core on a CPU: every stand-in it needs, in one place.

Megatron-Core asks for CUDA by name in a few lines that its CPU paths run through. Functions are
replaced, never modules, so that model, data parallelism and optimizer stay Megatron-Core's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils, yarn_rotary_pos_embedding
from megatron.core.ssm.gated_delta_net import common, gdn
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as tensor_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

from learner.model import delta_rule, gloo
from learner.model.context import owners, positions
from learner.model.norm import DuplicatedLinear


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
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = stream
    # Pipeline stages wait for what they sent, and move a tied embedding to its device.
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    # Sequence parallelism asks for random states by name, though nothing here is random.
    tensor_random.initialize_rng_tracker(inference_rng_tracker=True)
    # Splits of an exchange between experts' ranks are numbers on the host, which tensors here already are.
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host
    # Experts that ranks share in unequal parts are gathered over gloo.
    mappings._gather_along_first_dim = gloo.gather
    mappings._reduce_scatter_along_first_dim = gloo.reduce_scatter
    # Latent attention takes its narrow projections from ModelOpt when there is no Transformer Engine.
    multi_latent_attention.Linear = DuplicatedLinear
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
    # A table for a fused kernel, made when the model is built, is dealt out through pinned memory.
    yarn_rotary_pos_embedding.get_pos_emb_on_this_cp_rank = _table_share


def _table_share(table: torch.Tensor, dim: int, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """The rows of a rotary table that a context-parallel rank holds, along `dim`: its two pieces."""
    pieces = table.chunk(2 * group.size(), dim)
    return torch.cat((pieces[group.rank()], pieces[-1 - group.rank()]), dim)


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`tensor`, as numpy if asked for and it is one; Megatron-Core's own does so with CUDA tensors alone."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


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

    With context parallelism `t` holds this rank's pieces of the sequences. Same values as Megatron-Core's
    `_apply_rotary_pos_emb_thd`, in one pass over all sequences.
    """
    places = positions(cu_seqlens)
    if cp_group is not None and cp_group.size() > 1:
        places = places[owners(cu_seqlens, cp_group.size()) == cp_group.rank()]
    cos, sin = ((table(freqs) * mscale).flatten(1)[places, None] for table in (torch.cos, torch.sin))
    rotated, rest = t[..., : cos.size(-1)], t[..., cos.size(-1) :]
    if mla_rotary_interleaved:  # DeepSeek's pairs are neighbours in the checkpoint
        rotated = torch.cat((rotated[..., ::2], rotated[..., 1::2]), dim=-1)
    half = rope_utils._rotate_half(rotated, rotary_interleaved)
    turned = rotated * cos.to(t.dtype) + half * sin.to(t.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned
