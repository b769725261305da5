"""Tiny random checkpoints of every family, written by transformers, with weights that hide nothing.

Initial values would: norms that multiply by 1 or 1 + 0 do not show a wrong "+ 1", and equal decays
do not show a wrong sign. So every tensor is random, and epsilon is large enough to be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
NEXT = {
    **GROUPED,
    **EXPERTS,
    "shared_expert_intermediate_size": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
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
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {**GROUPED, "num_hidden_layers": 2}),
    "qwen3_moe": ("Qwen3Moe", {**GROUPED, **EXPERTS, "num_hidden_layers": 2, "norm_topk_prob": True}),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {**GROUPED, **EXPERTS, "num_hidden_layers": 3, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "qwen3_next": ("Qwen3Next", {**NEXT, "num_hidden_layers": 4}),
    "qwen3_next_mixed": (
        "Qwen3Next",
        {
            **NEXT,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "linear_attention"],
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 8.0,
                "beta_slow": 0.25,
                "mscale": 0.9,
                "mscale_all_dim": 0.7,
            },
        },
    ),
    "moonlight": ("DeepseekV3", {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
}
"""Class in transformers and fields of config.json; no two widths that could be confused are equal."""


SEEDS = {"qwen3_moe_mixed": 1, "qwen3_next_mixed": 2}
"""Seeds other than 0, with which no router choice hangs by a thread; a test asserts it of all."""


def make_family(case: str, folder: Path, std: float = 0.1, **changes: Any) -> torch.nn.Module:
    """Write the checkpoint of `case` to `folder`; returns transformers' model, in evaluation mode.

    `changes` are other fields of config.json than those of the case.
    """
    name, fields = CASES[case]
    model = random_model(name, {**fields, **changes}, SEEDS.get(case, 0), std)
    model.save_pretrained(folder)
    return model


def random_model(name: str, fields: dict[str, Any], seed: int = 0, std: float = 0.1) -> torch.nn.Module:
    """transformers' model of class `name` with random weights, in evaluation mode."""
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    zero_centred = name == "Qwen3Next"
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in tensor_name:
                continue
            if tensor_name.endswith("A_log"):  # decays from slow to fast: exp(A_log) from 0.3 to 3
                tensor.uniform_(-1.0, 1.0)
                continue
            tensor.normal_(0.0, std)
            if "norm" in tensor_name and (not zero_centred or "linear_attn" in tensor_name):
                tensor.add_(1.0)
    return model


def router_margin(model: torch.nn.Module, sequences: list[list[int]]) -> float:
    """The least by which any token's last chosen expert, or group of experts, is ahead of the next."""
    margins = [1.0]

    def look(gate: torch.nn.Module, _inputs: object, output: Any) -> None:
        config = model.config
        if not hasattr(gate, "e_score_correction_bias"):
            margins.append(_gap(output[0], config.num_experts_per_tok))
            return
        scores = output.sigmoid() + gate.e_score_correction_bias
        groups = scores.unflatten(-1, (config.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1)
        if config.n_group > 1:
            margins.append(_gap(best, config.topk_group))
        out = best < best.topk(config.topk_group).values[..., -1:]
        margins.append(
            _gap(groups.masked_fill(out[..., None], -10.0).flatten(-2), config.num_experts_per_tok)
        )

    hooks = [
        module.register_forward_hook(look)
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    for hook in hooks:
        hook.remove()
    return min(margins)


def stored_tensors(model: torch.nn.Module, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of transformers' model, or their gradients, under the names that its checkpoints have."""
    found = {}
    for name, tensor in model.named_parameters():
        value = tensor.grad if gradients else tensor.detach()
        prefix, _, kind = name.rpartition(".experts.")
        for expert, matrix in enumerate(value if prefix else ()):
            parts = matrix.chunk(2) if kind == "gate_up_proj" else (matrix,)
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            found |= {f"{prefix}.experts.{expert}.{n}.weight": p for n, p in zip(names, parts, strict=True)}
        if not prefix:
            found[name] = value
    if not gradients:
        found |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return found


def _gap(scores: torch.Tensor, chosen: int) -> float:
    if chosen == scores.size(-1):
        return 1.0
    best = scores.topk(chosen + 1, dim=-1).values
    return float((best[..., -2] - best[..., -1]).min())
