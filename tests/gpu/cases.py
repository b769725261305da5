"""Tiny random checkpoints in widths that GPU kernels take, and transformers' plain torch on them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.unit.learner.families import random_model, stored_tensors

LENGTHS = (5, 33, 2, 150, 17, 66, 9)
"""Ragged; of gated DeltaNet's chunks of 64 tokens, some have a part of one, some two or three."""

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
NEXT = {
    **GROUPED,
    **EXPERTS,
    "num_hidden_layers": 4,
    "shared_expert_intermediate_size": 80,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "rope_parameters": {**COMMON["rope_parameters"], "partial_rotary_factor": 0.25},
}
LATENT = {
    **COMMON,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 8.0,
    "beta_slow": 0.25,
    "mscale": 0.9,
    "mscale_all_dim": 0.7,
}
DEEPSEEK = {**LATENT, "q_lora_rank": 48, "n_group": 4, "topk_group": 2, "rope_parameters": YARN}
MOONLIGHT = {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
HYBRID = {
    "vocab_size": 96,
    "hidden_size": 64,
    "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 112,
    "ssm_state_size": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 64,
    "max_position_embeddings": 256,
    # transformers' plain torch cuts steps off below this, its kernels and Megatron-Core's do not.
    "time_step_min": 1e-9,
    "use_mamba_kernels": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {**GROUPED, "num_hidden_layers": 2}),
    "qwen3_moe": ("Qwen3Moe", {**GROUPED, **EXPERTS, "num_hidden_layers": 2, "norm_topk_prob": True}),
    "qwen3_next": ("Qwen3Next", NEXT),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "moonlight": ("DeepseekV3", MOONLIGHT),
    "nemotron_h": ("NemotronH", HYBRID),
}
"""Class in transformers and fields of config.json."""

WIDE = {
    "qwen3_next_wide": (
        "Qwen3Next",
        {**NEXT, "head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
    ),
    "deepseek_v3_wide": (
        "DeepseekV3",
        {**DEEPSEEK, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    ),
}
"""The same with heads as wide as published."""

SEEDS = {"qwen3_moe": 2, "qwen3_next": 12, "moonlight": 1}
"""Seeds other than 0, with which no router choice hangs by a thread; the tests assert it."""

ALL_CHOSEN = {
    "qwen3_moe": {"num_experts_per_tok": 8},
    "qwen3_next": {"num_experts_per_tok": 8},
    "deepseek_v3": {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    "moonlight": {"num_experts_per_tok": 8},
}
"""With every expert chosen, as many bits as bf16 has cannot change a choice."""


def sequences() -> list[list[int]]:
    """The same ragged batch every time."""
    source = np.random.default_rng(0)
    return [source.integers(0, 96, length).tolist() for length in LENGTHS]


def make(case: str, folder: Path, rounded: bool = False) -> torch.nn.Module:
    """Write the checkpoint of `case`; returns transformers' model in fp32, on the CPU, in plain torch.

    `rounded`: all weights are numbers that bf16 holds, and every expert is chosen.
    """
    name, fields = {**CASES, **WIDE}[case]
    if rounded:
        fields = {**fields, **ALL_CHOSEN.get(case.removesuffix("_wide"), {})}
    with plain_torch():
        model = random_model(name, fields, SEEDS.get(case, 0))
    if rounded:
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.copy_(tensor.bfloat16())
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = {key: value.contiguous() for key, value in hf_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors")
    return model


def hf_tensors(model: torch.nn.Module, gradients: bool = False) -> dict[str, torch.Tensor]:
    """`stored_tensors`, and Nemotron-H under the names that its published checkpoints have."""
    found = stored_tensors(model, gradients)
    if model.config.model_type != "nemotron_h":
        return found
    return {name.replace("model.", "backbone.", 1): tensor for name, tensor in found.items()}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """[N, V]: transformers' logits at every position of `sequences` but the last of each."""
    device = next(model.parameters()).device
    return torch.cat([model(torch.tensor([s[:-1]], device=device)).logits[0] for s in sequences()])


def logprobs_of(model: torch.nn.Module) -> torch.Tensor:
    """[N]: log-probability of every token of `sequences` but the first of each."""
    logs = logits_of(model).float().log_softmax(-1)
    targets = torch.tensor([token for sequence in sequences() for token in sequence[1:]], device=logs.device)
    return logs.gather(1, targets[:, None]).squeeze(1)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within it transformers builds Qwen3-Next without the kernels that it finds installed."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    names = [
        "causal_conv1d_fn", "causal_conv1d_update", "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule", "FusedRMSNormGated",
    ]  # fmt: skip
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    try:
        for name in found:
            setattr(module, name, None)
        yield
    finally:
        for name, value in found.items():
            setattr(module, name, value)
