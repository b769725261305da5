"""DeepSeek-V3 and Moonlight."""

from __future__ import annotations

from typing import Any, ClassVar

from learner.errors import ConfigError
from learner.model.families.base import Family, check_choice
from learner.model.shape import Experts, LatentAttention, Layer, Shape, Yarn


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
    """Experts that a token passes, the shared ones apart."""
    moe_intermediate_size: int
    """Inner width of one expert."""
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
        check_choice(self.num_experts_per_tok, self.n_routed_experts)
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
