"""A model of 1.7 B parameters, Qwen3-1.7B's shape: what is exported, and an engine's own layout of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

HIDDEN, LAYERS, INNER, VOCABULARY, HEADS, GROUPS, HEAD = 2048, 28, 6144, 151936, 16, 8, 128
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "bos_token_id": 0,
}
"""Of a Hugging Face folder."""

Weights = dict[str, torch.Tensor]


def names() -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        part = f"model.layers.{layer}"
        found |= {
            f"{part}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{part}.self_attn.k_proj.weight": (GROUPS * HEAD, HIDDEN),
            f"{part}.self_attn.v_proj.weight": (GROUPS * HEAD, HIDDEN),
            f"{part}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{part}.self_attn.q_norm.weight": (HEAD,),
            f"{part}.self_attn.k_norm.weight": (HEAD,),
            f"{part}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{part}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{part}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{part}.input_layernorm.weight": (HIDDEN,),
            f"{part}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,)}


def exported(seed: int) -> Weights:
    """A version: bf16 tensors on the CPU, drawn on the GPU."""
    draw = torch.Generator("cuda").manual_seed(seed)
    weights = {}
    for name, shape in names().items():
        noise = torch.randn(shape, generator=draw, device="cuda") * 0.03
        weights[name] = (noise + ("norm" in name)).bfloat16().cpu()
    return weights


class Fused(torch.nn.Module):
    """The same as an engine keeps it: query, key and value in one tensor, gate and up in one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        for name, shape in names().items():
            own, rows = place(name)
            if rows == 0:
                size = {"qkv_proj": (HEADS + 2 * GROUPS) * HEAD, "gate_up_proj": 2 * INNER}
                fused = next((count for part, count in size.items() if part in own), shape[0])
                tensor = torch.zeros(fused, *shape[1:], dtype=torch.bfloat16, device=device)
                self.register_parameter(
                    own.replace(".", "/"), torch.nn.Parameter(tensor, requires_grad=False)
                )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """By Hugging Face names."""
        for name, tensor in weights:
            own, row = place(name)
            self.get_parameter(own.replace(".", "/")).data[row : row + tensor.shape[0]].copy_(tensor)


def place(name: str) -> tuple[str, int]:
    """(the engine's tensor, the first row) of an exported tensor."""
    rows = {
        "q_proj": 0,
        "k_proj": HEADS * HEAD,
        "v_proj": (HEADS + GROUPS) * HEAD,
        "gate_proj": 0,
        "up_proj": INNER,
    }
    for part, row in rows.items():
        if part in name:
            fused = "gate_up_proj" if part in ("gate_proj", "up_proj") else "qkv_proj"
            return name.replace(part, fused), row
    return name, 0
