"""What config.json says in every family."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from learner.errors import ConfigError
from learner.model.shape import Shape


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


def check_choice(chosen: int, count: int) -> None:
    """Raises `ConfigError` for fewer experts a token than are built, or more than there are."""
    if not 2 <= chosen <= count:
        raise ConfigError(f"num_experts_per_tok: got {chosen}, expected 2 to {count} (the number of experts)")
