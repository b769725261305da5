"""What a Hugging Face config.json says of a dense Qwen3 model, read strictly.

A field that changes the mathematics and is not built here is refused by name: a model that trains
on slightly different mathematics than the engine samples from fails without a message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from learner.errors import ModelError


class Qwen3Shape(msgspec.Struct, frozen=True):
    """The fields of config.json that fix the architecture."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated MLP."""
    num_hidden_layers: int
    """Layers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; divides the query heads."""
    head_dim: int
    """Width of one head."""
    rms_norm_eps: float
    """Epsilon of every norm."""
    max_position_embeddings: int
    """Longest sequence."""
    rope_theta: float
    """Base of the rotary embedding."""
    tie_word_embeddings: bool
    """Whether the output layer is the embedding."""


def read_shape(folder: Path) -> Qwen3Shape:
    """Read `folder`/config.json. Raises `ModelError` naming the file and the field."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; give a Hugging Face checkpoint folder") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error}); copy the checkpoint again") from error
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _refuse_unsupported(path, raw, rope)
    fields = {**raw, "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}
    fields.setdefault("tie_word_embeddings", False)
    try:
        return msgspec.convert(fields, Qwen3Shape)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {error}; expected the config.json of a dense Qwen3 model") from error


def _refuse_unsupported(path: Path, raw: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raise for the first field whose value means a computation that is not built."""
    expected = {
        "model_type": (raw.get("model_type"), "qwen3"),
        "architectures": (raw.get("architectures", ["Qwen3ForCausalLM"]), ["Qwen3ForCausalLM"]),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (raw.get("attention_bias", False), False),
        "attention_dropout": (raw.get("attention_dropout", 0.0), 0.0),
        "use_sliding_window": (raw.get("use_sliding_window", False), False),
        "layer_types": (sorted(set(raw.get("layer_types") or ["full_attention"])), ["full_attention"]),
        "rope_parameters.rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "rope_parameters.partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "quantization_config": (raw.get("quantization_config"), None),
    }
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ModelError(
                f"{path}: {name}: got {got!r}, expected {wanted!r}; only dense Qwen3 models are built here"
            )
