"""A tiny Hugging Face checkpoint of a Qwen3 family with random weights and a byte-level tokenizer.

The files are written directly, so that a run starts without importing torch or transformers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

EOS = "<|endoftext|>"
"""The special token that ends an answer and pads."""

ANSWER = "#### "
"""The ordinary token that begins a final answer, so that `#### 46` and its end are four tokens."""

EOS_ID, ANSWER_ID = 256, 257
"""Ids of the two; the 256 ids below them are the bytes, so any text has tokens."""

VOCABULARY = 320
"""Rows of the embedding: a multiple of 64, as engine and trainer would pad it to. Ids from 258 on
are never read and have no text."""

POSITIONS = 2048
"""Longest sequence, in tokens."""


FAMILIES = ("qwen3", "qwen3_moe", "qwen3_next")
"""Values of config.json's `model_type` that are made here."""

ARCHITECTURES = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "qwen3_next": "Qwen3Next"}

EXPERTS: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
}
"""Fields of a model with experts. SGLang on a CPU wants widths in multiples of 32."""

HYBRID: dict[str, Any] = {
    "full_attention_interval": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "partial_rotary_factor": 0.25,
    "shared_expert_intermediate_size": 128,
}
"""Fields of a model with gated DeltaNet in every other layer and a shared expert. With 8 experts of half
the width a step costs the same, and the loss after 60 steps of a warm-up was 0.768 instead of 0.748."""

DECAY_STEPS = (1e-3, 1e-1)
"""Range of softplus(dt_bias): a state lasts for one to a thousand tokens. With transformers' dt_bias of 1
it is gone after three at most."""


def make_tiny(family: str, folder: Path, *, seed: int) -> Path:
    """The tiny model of one of `FAMILIES`, in `folder`; see `make_tiny_qwen3`. It has two layers."""
    return make_tiny_qwen3(folder, seed=seed, family=family)


def make_tiny_qwen3(
    folder: Path,
    *,
    seed: int,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 256,
    std: float = 0.06,
    family: str = "qwen3",
) -> Path:
    """Writes config, tokenizer and fp32 weights into `folder`, made if missing, and returns it.

    The same seed writes the same bytes. Matrices are normal with deviation `std`, norms multiply by 1,
    decays are those that gated DeltaNet was published with (Yang, Kautz, Hatamizadeh 2024), which are
    Mamba-2's. `std` is above transformers' 0.02, which suits wide models: at width 128 a warm-up on
    one-digit sums reached an accuracy of 0.45 after 44 steps with 0.06, 0.52 after 80 steps with 0.02.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hybrid = HYBRID if family == "qwen3_next" else {}
    rotated = {name: value for name, value in hybrid.items() if name == "partial_rotary_factor"}
    config = {
        "architectures": [f"{ARCHITECTURES[family]}ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": EOS_ID,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": std,
        "intermediate_size": intermediate,
        "max_position_embeddings": POSITIONS,
        "model_type": family,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": EOS_ID,
        "rms_norm_eps": 1e-6,
        # Both spellings: transformers 5 reads the first, readers of older files the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | rotated,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCABULARY,
        **(EXPERTS if family != "qwen3" else {}),
        **hybrid,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": EOS_ID})
    _write_tokenizer(folder)
    _write_weights(folder, config, seed)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """tokenizer.json with one token a byte, no merges, and the two tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    tokenizer.add_tokens([AddedToken(ANSWER, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": POSITIONS,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_weights(folder: Path, config: dict[str, Any], seed: int) -> None:
    """model.safetensors under the names that published checkpoints have."""
    from safetensors.numpy import save_file

    source = np.random.default_rng(seed)
    std = np.float32(config["initializer_range"])
    hybrid = config["model_type"] == "qwen3_next"
    tensors = {name: _values(source, name, dims, std, hybrid) for name, dims in _shapes(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _values(
    source: np.random.Generator, name: str, dims: tuple[int, ...], std: np.float32, hybrid: bool
) -> np.ndarray:
    if name.endswith("A_log"):
        return np.log(source.uniform(1.0, 16.0, dims)).astype(np.float32)
    if name.endswith("dt_bias"):
        low, high = map(math.log, DECAY_STEPS)
        return _inverse_softplus(np.exp(source.uniform(low, high, dims))).astype(np.float32)
    if name.endswith("conv1d.weight"):
        return source.uniform(-0.5, 0.5, dims).astype(np.float32)
    if len(dims) == 1:
        # Qwen3-Next's norms multiply by 1 + weight, but for those inside gated DeltaNet.
        centred = hybrid and "norm" in name and "linear_attn" not in name
        return np.full(dims, 0.0 if centred else 1.0, np.float32)
    return source.standard_normal(dims, np.float32) * std


def _inverse_softplus(y: np.ndarray) -> np.ndarray:
    return y + np.log(-np.expm1(-y))


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape; matrices are [out, in]."""
    hidden, hybrid = config["hidden_size"], config["model_type"] == "qwen3_next"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for index in range(config["num_hidden_layers"]):
        linear = hybrid and (index + 1) % config["full_attention_interval"] != 0
        layer = {
            "input_layernorm.weight": (hidden,),
            **(_linear_attention(config) if linear else _attention(config, gates=2 if hybrid else 1)),
            "post_attention_layernorm.weight": (hidden,),
            **(
                _experts(config)
                if "num_experts" in config
                else _mlp("mlp", hidden, config["intermediate_size"])
            ),
        }
        shapes |= {f"model.layers.{index}.{name}": dims for name, dims in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def _attention(config: dict[str, Any], gates: int) -> dict[str, tuple[int, ...]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj.weight": (gates * queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }


def _linear_attention(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    return {
        "linear_attn.in_proj_qkvz.weight": (2 * keys + 2 * values, hidden),
        "linear_attn.in_proj_ba.weight": (2 * heads, hidden),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _experts(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, count = config["hidden_size"], config["num_experts"]
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (count, hidden)}
    for expert in range(count):
        shapes |= _mlp(f"mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        shapes |= _mlp("mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def _mlp(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (inner, hidden),
        f"{name}.up_proj.weight": (inner, hidden),
        f"{name}.down_proj.weight": (hidden, inner),
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
