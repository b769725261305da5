"""The platform: what SGLang uses for memory, attention and sampling when there is only a CPU.

SGLang's own CPU branch needs the compiled sgl-kernel for CPU, which no package index offers. As an
out-of-tree platform the server takes its native torch code paths instead.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

ATTENTION_BACKEND = "torch_native"
"""Name under which our attention stands in for SGLang's own; what ``--attention-backend`` takes.

The name has to be this one: SGLang tells by it that the cache is to be managed without Triton.
"""


def declare_attention_deterministic() -> None:
    """Count our attention among the deterministic ones; call it before the command line is parsed.

    That lets the server start with ``--enable-deterministic-inference``, without which SGLang ignores
    a request's `sampling_seed` silently.
    """
    from sglang.srt.server_args import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices([ATTENTION_BACKEND])


def torch_functions() -> dict[str, object]:
    """What stands in for Triton kernels of gated DeltaNet: SGLang's name and ours.

    They are hooks of its registry, which also reaches modules that have imported the original.
    """
    from actors.sglang_cpu.delta_rule import add_gated, gated_rms_norm, split_projections
    from actors.sglang_cpu.linear_attention import GatedDeltaNetAttention

    kernels, layers = "sglang.kernels.ops.attention", "sglang.srt.layers.attention"
    return {
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add": add_gated,
        f"{kernels}.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat": split_projections,
        f"{kernels}.fla.fused_norm_gate.rms_norm_gated": gated_rms_norm,
        f"{layers}.linear.gdn_backend.GDNAttnBackend": GatedDeltaNetAttention,
    }


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU served by plain torch operators: dense models, experts, gated DeltaNet; no CUDA graphs."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def init_backend(self) -> None:
        """Register our attention, and replace what needs Triton or pinned memory."""
        from sglang.srt import batch_invariant_ops
        from sglang.srt.layers import sampler
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.state_capturer import base

        from actors.sglang_cpu.attention import BatchedAttention
        from actors.sglang_cpu.host_cache import PageableHostCache
        from actors.sglang_cpu.sampling import multinomial_with_seed

        register_attention_backend(ATTENTION_BACKEND)(BatchedAttention)
        sampler.multinomial_with_seed = multinomial_with_seed
        base.BaseHostCache = PageableHostCache
        batch_invariant_ops.enable_batch_invariant_mode = keep_torch_operators

    def get_default_attention_backend(self) -> str:
        """The attention used when the command line names none."""
        return ATTENTION_BACKEND

    def get_mha_kv_pool_cls(self) -> type:
        """The plain key-value pool: one tensor a layer, one row a token."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        """The allocator of that pool's rows; with pages of one token it needs no Triton."""
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator


def keep_torch_operators() -> None:
    """Stands in for SGLang's switch to batch-invariant Triton kernels, which a CPU has not.

    Torch's own operators stay. Their results depend on the shape of the batch in the last bits, so a
    seed repeats an answer up to a draw that falls within rounding of a boundary.
    """
