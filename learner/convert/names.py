"""Which Hugging Face tensors make up which Megatron-Core tensor, for dense Qwen3.

Rows of an interleaved tensor: Megatron-Core keeps, for each key-value head, its query heads, then
the key, then the value; and the gate above the up projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from learner.model.hf_config import Qwen3Shape


@dataclass(frozen=True)
class Rule:
    """One Megatron-Core tensor and the Hugging Face tensors it is made of."""

    mcore: str
    """Name in `GPTModel.state_dict()`."""
    hf: tuple[str, ...]
    """Names in the checkpoint, in the order in which their rows are interleaved."""
    heads: int = 1
    """Blocks over which the rows of the Hugging Face tensors are interleaved."""

    def merge(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The Megatron-Core tensor from the Hugging Face ones."""
        if len(parts) == 1:
            return parts[0]
        blocks = [part.unflatten(0, (self.heads, -1)) for part in parts]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def split(self, merged: torch.Tensor, rows: list[int]) -> list[torch.Tensor]:
        """The Hugging Face tensors, of `rows` rows each, from the Megatron-Core one; views or copies."""
        if len(rows) == 1:
            return [merged]
        blocks = merged.unflatten(0, (self.heads, -1))
        parts = blocks.split([count // self.heads for count in rows], dim=1)
        return [part.flatten(0, 1) for part in parts]


def rules(shape: Qwen3Shape) -> Iterator[Rule]:
    """Every tensor of the model exactly once, in the order of export."""
    yield Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    for layer in range(shape.num_hidden_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        yield Rule(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",))
        yield Rule(
            ours + "self_attention.linear_qkv.weight",
            tuple(f"{attention}{name}_proj.weight" for name in "qkv"),
            heads=shape.num_key_value_heads,
        )
        yield Rule(ours + "self_attention.q_layernorm.weight", (attention + "q_norm.weight",))
        yield Rule(ours + "self_attention.k_layernorm.weight", (attention + "k_norm.weight",))
        yield Rule(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",))
        yield Rule(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",))
        gate_and_up = tuple(f"{theirs}mlp.{name}_proj.weight" for name in ("gate", "up"))
        yield Rule(ours + "mlp.linear_fc1.weight", gate_and_up)
        yield Rule(ours + "mlp.linear_fc2.weight", (theirs + "mlp.down_proj.weight",))
    yield Rule("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not shape.tie_word_embeddings:
        yield Rule("output_layer.weight", ("lm_head.weight",))


def hf_shapes(shape: Qwen3Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, in the order of export."""
    width, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    query, keys = shape.num_attention_heads * head, shape.num_key_value_heads * head
    by_suffix = {
        "embed_tokens.weight": (shape.vocab_size, width),
        "lm_head.weight": (shape.vocab_size, width),
        "q_proj.weight": (query, width),
        "k_proj.weight": (keys, width),
        "v_proj.weight": (keys, width),
        "o_proj.weight": (width, query),
        "q_norm.weight": (head,),
        "k_norm.weight": (head,),
        "gate_proj.weight": (inner, width),
        "up_proj.weight": (inner, width),
        "down_proj.weight": (width, inner),
        "layernorm.weight": (width,),
        "norm.weight": (width,),
    }
    return {
        name: next(dims for suffix, dims in by_suffix.items() if name.endswith(suffix))
        for rule in rules(shape)
        for name in rule.hf
    }
