"""Nemotron-H."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from learner.errors import ConfigError
from learner.model.families.base import Family
from learner.model.shape import Attention, Hybrid, Mamba, Shape


class NemotronH(Family, kw_only=True, frozen=True):
    """Nemotron-H: Mamba-2, attention and MLP layers in any order."""

    fixed: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-5,  # of all norms, because the one inside a Mamba-2 layer has no other
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "num_nextn_predict_layers": 0,
        "quantization_config": None,
        "residual_in_fp32": False,
        "sliding_window": None,
        "use_bias": False,
        "use_conv_bias": True,
    }
    # The fields of experts are there without any, those of time steps matter to initial values only.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "auto_map", "expand", "mamba_ssm_cache_dtype", "moe_intermediate_size", "moe_latent_size",
            "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "mtp_layers_block_type",
            "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
            "num_logits_to_keep", "rescale_prenorm_residual", "routed_scaling_factor", "time_step_floor",
            "time_step_max", "time_step_min", "topk_group", "use_mamba_kernels",
        }
    )  # fmt: skip

    num_hidden_layers: int = 0
    """Not read: the list of layers says it."""
    rms_norm_eps: float = 1e-5
    """As `layer_norm_epsilon`."""
    layers_block_type: list[str] | None = None
    """`mamba`, `attention` or `mlp` for each layer; None: see the next one."""
    hybrid_override_pattern: str | None = None
    """The list of layers as older checkpoints write it."""
    head_dim: int
    """Width of an attention head."""
    mamba_num_heads: int
    """Heads of the Mamba-2 state."""
    mamba_head_dim: int
    """Width of one of them."""
    n_groups: int
    """Groups of Mamba-2 heads that share input and output projections; divides the heads."""
    ssm_state_size: int
    """Numbers a channel remembers."""
    conv_kernel: int
    """Taps of the causal convolution."""
    chunk_size: int
    """Tokens that the Mamba-2 kernels take at a time."""
    time_step_limit: Any = None
    """Bounds of the step width; built is none."""

    def shape(self) -> Shape:
        """One part a layer. Raises `ConfigError` for layers of experts."""
        unbounded = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])
        self._expect("time_step_limit", self.time_step_limit, *unbounded)
        mamba = Mamba(
            self.mamba_num_heads,
            self.mamba_head_dim,
            self.n_groups,
            self.ssm_state_size,
            self.conv_kernel,
            self.chunk_size,
        )
        return self._shape(
            attention=Attention(
                self.num_attention_heads, self.num_key_value_heads, self.head_dim, rotary=0.0
            ),
            layers=(),
            hybrid=Hybrid(self._pattern(), mamba),
        )

    def _pattern(self) -> str:
        if self.layers_block_type is None:
            pattern = self.hybrid_override_pattern or ""
            for letter in pattern:
                self._expect("hybrid_override_pattern", letter, "M", "*", "-")
        else:
            letters = {"mamba": "M", "attention": "*", "mlp": "-"}
            for kind in self.layers_block_type:
                self._expect("layers_block_type", kind, *letters)
            pattern = "".join(letters[kind] for kind in self.layers_block_type)
        if not pattern:
            raise ConfigError("layers_block_type: missing, expected a list of mamba, attention and mlp")
        return pattern
