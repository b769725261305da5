"""Qwen3: dense, with experts, and with gated DeltaNet."""

from __future__ import annotations

from typing import Any, ClassVar

from learner.errors import ConfigError
from learner.model.families.base import Family, check_choice
from learner.model.shape import Attention, DeltaNet, Experts, Layer, Shape


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
        check_choice(self.num_experts_per_tok, count)
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
    """Whether the weights of a token's experts sum to 1."""
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
