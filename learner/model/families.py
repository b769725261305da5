"""The families of models that are built, each with the fields of its config.json.

A field is read, or must have the one value that is built, or says nothing about the mathematics;
any other is refused by name (`learner/model/hf_config.py`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec

from learner.errors import ConfigError
from learner.model.shape import (
    Attention,
    DeltaNet,
    Experts,
    Hybrid,
    LatentAttention,
    Layer,
    Mamba,
    Shape,
    Yarn,
)


class Family(msgspec.Struct, kw_only=True, frozen=True):
    """What config.json says in every family."""

    fixed: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "quantization_config": None,
    }
    """Fields with the only value that is built; absent means that value."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields of the family that do not change the model's output."""

    model_type: str
    """Key of `FAMILIES`."""
    architectures: list[str] | None = None
    """Must be the one that is built; None: not said."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Inner width of a dense MLP."""
    num_hidden_layers: int
    """Layers, those for multi-token prediction apart."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; divides the query heads."""
    rms_norm_eps: float
    """Added to the mean square under the root."""
    max_position_embeddings: int
    """Longest sequence, in tokens."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding."""
    rope_theta: float = 10000.0
    """With `partial_rotary_factor`: from `rope_parameters` where that has it."""
    partial_rotary_factor: float | None = None
    """Share of a head's width that is rotated; None: the family's own."""

    def shape(self) -> Shape:
        """The architecture. Raises `ConfigError` for a combination that is not built."""
        raise NotImplementedError

    def _shape(self, **fields: Any) -> Shape:
        """The fields that all families share, and those given."""
        return Shape(
            family=self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            dense_width=self.intermediate_size,
            norm_eps=self.rms_norm_eps,
            max_length=self.max_position_embeddings,
            rope_theta=self.rope_theta,
            tied=self.tie_word_embeddings,
            **fields,
        )

    def _expect(self, field: str, value: Any, *accepted: Any) -> None:
        if value not in accepted:
            wanted = " or ".join(repr(item) for item in accepted)
            raise ConfigError(f"{field}: got {value!r}, expected {wanted}; nothing else is built here")


class Qwen3(Family, kw_only=True, frozen=True):
    """Dense Qwen3."""

    fixed: ClassVar[dict[str, Any]] = {**Family.fixed, "use_sliding_window": False}
    ignored: ClassVar[frozenset[str]] = frozenset({"max_window_layers", "sliding_window"})

    head_dim: int
    """Width of one head, not bound to hidden_size / heads."""
    layer_types: list[str] | None = None
    """Attention of each layer; None: the family's own order."""

    def shape(self) -> Shape:
        """Softmax attention and a dense MLP in every layer."""
        return self._shape(attention=self._attention(), layers=self._layers())

    def _attention(self) -> Attention:
        self._expect("partial_rotary_factor", self.partial_rotary_factor, None, 1.0)
        return Attention(self.num_attention_heads, self.num_key_value_heads, self.head_dim)

    def _layers(self) -> tuple[Layer, ...]:
        self._expect("layer_types", sorted(set(self.layer_types or ["full_attention"])), ["full_attention"])
        return (Layer(delta_net=False, experts=False),) * self.num_hidden_layers


class Qwen3Moe(Qwen3, kw_only=True, frozen=True):
    """Qwen3 with experts."""

    ignored: ClassVar[frozenset[str]] = Qwen3.ignored | {"output_router_logits", "router_aux_loss_coef"}

    num_experts: int | None = None
    """Of a layer; None: `num_local_experts` says it."""
    num_local_experts: int | None = None
    """What transformers 5 calls `num_experts`."""
    num_experts_per_tok: int
    """Experts a token is sent to, from 2."""
    moe_intermediate_size: int
    """Inner width of an expert."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts sum to 1."""
    decoder_sparse_step: int = 1
    """Every how many layers experts stand; 1: in all."""
    mlp_only_layers: list[int] | None = None
    """Layers, from 0, that have a dense MLP all the same."""

    def shape(self) -> Shape:
        """Softmax attention in every layer, experts in those that config.json names."""
        return self._shape(attention=self._attention(), layers=self._layers(), experts=self._experts())

    def _layers(self) -> tuple[Layer, ...]:
        (layer, *_) = super()._layers()
        return tuple(Layer(layer.delta_net, self._sparse(index)) for index in range(self.num_hidden_layers))

    def _sparse(self, index: int) -> bool:
        return index not in (self.mlp_only_layers or []) and (index + 1) % self.decoder_sparse_step == 0

    def _experts(self, **shared: Any) -> Experts:
        count = self.num_local_experts if self.num_experts is None else self.num_experts
        if count is None:
            raise ConfigError("num_experts: missing; copy config.json of the checkpoint again")
        _check_choice(self.num_experts_per_tok, count)
        normalised = self.norm_topk_prob
        return Experts(
            count, self.num_experts_per_tok, self.moe_intermediate_size, normalised=normalised, **shared
        )


class Qwen3Next(Qwen3Moe, kw_only=True, frozen=True):
    """Qwen3-Next: gated DeltaNet, gated attention, experts with a gated shared one, norms at zero."""

    linear_num_key_heads: int
    """Query and key heads of DeltaNet; divides its value heads."""
    linear_num_value_heads: int
    """Value heads of DeltaNet."""
    linear_key_head_dim: int
    """Width of a query or key head of DeltaNet."""
    linear_value_head_dim: int
    """Width of a value head of DeltaNet."""
    linear_conv_kernel_dim: int
    """Taps of its causal convolution."""
    shared_expert_intermediate_size: int
    """Inner width of the expert that every token passes."""
    norm_topk_prob: bool = True
    full_attention_interval: int = 4
    """Every how many layers softmax attention stands, unless `layer_types` lists them."""

    def shape(self) -> Shape:
        """Gated DeltaNet or gated attention in each layer."""
        return self._shape(
            attention=self._attention(),
            layers=self._layers(),
            delta_net=DeltaNet(
                self.linear_num_key_heads,
                self.linear_num_value_heads,
                self.linear_key_head_dim,
                self.linear_value_head_dim,
                self.linear_conv_kernel_dim,
            ),
            experts=self._experts(shared_width=self.shared_expert_intermediate_size, shared_gate=True),
            mtp_layers=1,
            zero_centred=True,
        )

    def _attention(self) -> Attention:
        share = 0.25 if self.partial_rotary_factor is None else self.partial_rotary_factor
        return Attention(self.num_attention_heads, self.num_key_value_heads, self.head_dim, share, gated=True)

    def _layers(self) -> tuple[Layer, ...]:
        kinds = self.layer_types or [
            "linear_attention" if (index + 1) % self.full_attention_interval else "full_attention"
            for index in range(self.num_hidden_layers)
        ]
        if len(kinds) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types: got {len(kinds)} layers, expected num_hidden_layers = {self.num_hidden_layers}"
            )
        for kind in kinds:
            self._expect("layer_types", kind, "linear_attention", "full_attention")
        return tuple(
            Layer(kind == "linear_attention", self._sparse(index)) for index, kind in enumerate(kinds)
        )


class DeepseekV3(Family, kw_only=True, frozen=True):
    """DeepSeek-V3 and Moonlight: latent attention, experts chosen by biased sigmoids, shared experts."""

    fixed: ClassVar[dict[str, Any]] = {
        **Family.fixed,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "partial_rotary_factor": None,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"auto_map", "aux_loss_alpha", "ep_size", "head_dim", "pretraining_tp", "qk_head_dim", "seq_aux"}
    )

    n_routed_experts: int
    """Experts of a layer, the shared ones apart."""
    n_shared_experts: int
    """Experts that every token passes, built as one of their summed width."""
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    """Layers from the embedding up that have a dense MLP."""
    routed_scaling_factor: float
    """To what the weights of a token's experts sum."""
    n_group: int
    """Groups into which the router divides the experts; 1: it does not."""
    topk_group: int
    """Groups of which a token's experts are chosen."""
    q_lora_rank: int | None
    """Width of the queries' bottleneck; None: they are projected directly."""
    kv_lora_rank: int
    """Width of the bottleneck of keys and values."""
    qk_nope_head_dim: int
    """Width of a query or key head that is not rotated."""
    qk_rope_head_dim: int
    """Width that is rotated; all heads share that of the keys."""
    v_head_dim: int
    """Width of a value head."""
    num_nextn_predict_layers: int = 0
    """Layers for multi-token prediction; 0: none."""
    yarn: Yarn | None = None
    """Read from `rope_parameters`."""

    def shape(self) -> Shape:
        """Latent attention in every layer, experts behind the first few."""
        self._expect("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)
        _check_choice(self.num_experts_per_tok, self.n_routed_experts)
        if self.n_group > 1:  # a group's score is the sum of its best two; here, of as many as it may give
            self._expect("num_experts_per_tok", self.num_experts_per_tok, 2 * self.topk_group)
        return self._shape(
            attention=LatentAttention(
                self.num_attention_heads,
                self.q_lora_rank,
                self.kv_lora_rank,
                self.qk_nope_head_dim,
                self.qk_rope_head_dim,
                self.v_head_dim,
                self._yarn(),
            ),
            mtp_layers=self.num_nextn_predict_layers,
            layers=tuple(
                Layer(delta_net=False, experts=index >= self.first_k_dense_replace)
                for index in range(self.num_hidden_layers)
            ),
            experts=Experts(
                self.n_routed_experts,
                self.num_experts_per_tok,
                self.moe_intermediate_size,
                score="sigmoid",
                scale=self.routed_scaling_factor,
                groups=self.n_group,
                chosen_groups=self.topk_group,
                shared_width=self.moe_intermediate_size * self.n_shared_experts,
            ),
        )

    def _yarn(self) -> Yarn | None:
        if self.yarn is not None and not (self.yarn.mscale and self.yarn.mscale_all_dim):
            raise ConfigError(
                f"rope_parameters: got mscale {self.yarn.mscale}, mscale_all_dim {self.yarn.mscale_all_dim}, "
                "expected neither to be 0; nothing else is built here"
            )
        return self.yarn


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
    layers_block_type: list[str] | None = None
    """`mamba`, `attention` or `mlp` for each layer; None: see the next one."""
    hybrid_override_pattern: str | None = None
    """The list of layers as older checkpoints write it."""
    head_dim: int
    mamba_num_heads: int
    """Heads of the Mamba-2 state."""
    mamba_head_dim: int
    """Width of one of them."""
    n_groups: int
    """Groups of Mamba-2 heads that share input and output projections; divides the heads."""
    ssm_state_size: int
    """Numbers a channel remembers."""
    conv_kernel: int
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


def _check_choice(chosen: int, count: int) -> None:
    if not 2 <= chosen <= count:
        raise ConfigError(f"num_experts_per_tok: got {chosen}, expected 2 to {count} (the number of experts)")


FAMILIES: dict[str, tuple[str, type[Family]]] = {
    "qwen3": ("Qwen3ForCausalLM", Qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", Qwen3Moe),
    "qwen3_next": ("Qwen3NextForCausalLM", Qwen3Next),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DeepseekV3),
    "nemotron_h": ("NemotronHForCausalLM", NemotronH),
}
"""Of each `model_type` its one architecture and its fields."""
