"""config.json of every family: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from learner.errors import ConfigError, ModelError
from learner.model.hf_config import read_shape, shape_of
from learner.model.shape import Attention, Experts, LatentAttention, Layer, Yarn
from tests.unit.learner.families import CASES, make_family
from tests.unit.learner.test_names import QWEN3_NEXT_80B

MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
"""config.json of Moonlight-16B-A3B."""


def test_qwen3_next_as_published() -> None:
    shape = shape_of(QWEN3_NEXT_80B)
    assert shape.attention == Attention(16, 2, 256, rotary=0.25, gated=True)
    assert shape.experts == Experts(512, 10, 512, shared_width=512, shared_gate=True)
    kinds = [layer.delta_net for layer in shape.layers]
    assert kinds == [True, True, True, False] * 12
    assert all(layer.experts for layer in shape.layers)
    assert (shape.rope_theta, shape.zero_centred) == (1e7, True)


def test_moonlight_as_published() -> None:
    shape = shape_of(MOONLIGHT)
    assert shape.attention == LatentAttention(16, None, 512, 128, 64, 128)
    assert shape.experts == Experts(64, 6, 1408, score="sigmoid", scale=2.446, shared_width=2816)
    assert shape.layers == (Layer(False, False), *[Layer(False, True)] * 26)


@pytest.mark.parametrize("case", list(CASES))
def test_both_spellings_of_rotary_fields_say_the_same(case: str, tmp_path: Path) -> None:
    make_family(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    scaling = {"type": rope.pop("rope_type"), **rope}
    older = {**config, "rope_theta": scaling.pop("rope_theta")}
    older["rope_scaling"] = scaling if scaling["type"] == "yarn" else None
    assert shape_of(older) == read_shape(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention"] * 47 + ["sliding_attention"]),
        ("layer_types", ["full_attention"]),
        ("num_experts", None),
        ("num_experts_per_tok", 1),
        ("num_experts_per_tok", 513),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [11, 11, 10]}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("attn_output_gate", False),
        ("hidden_size", "2048"),
    ],
)
def test_what_qwen3_next_cannot_be_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_NEXT_80B, field: value}))
    with pytest.raises(ModelError, match=rf"config\.json: .*{field}"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("norm_topk_prob", False),
        ("moe_layer_freq", 2),
        ("num_key_value_heads", 8),
        ("rope_interleave", False),
        ("partial_rotary_factor", 0.5),
        ("linear_num_key_heads", 4),
    ],
)
def test_what_deepseek_v3_cannot_be_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        shape_of({**MOONLIGHT, field: value})


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0}


def test_yarn_is_read_whole() -> None:
    shape = shape_of({**MOONLIGHT, "rope_scaling": {**YARN, "mscale_all_dim": 0.5, "beta_slow": 2}})
    assert shape.attention.yarn == Yarn(40.0, 4096, 1.0, 0.5, beta_fast=32.0, beta_slow=2.0)
    for more, said in (
        ({}, "missing required field `mscale_all_dim`"),
        ({"mscale_all_dim": 0.0}, r"got mscale 1\.0, mscale_all_dim 0\.0, expected neither to be 0"),
        ({"mscale_all_dim": 1.0, "attention_factor": 1.0}, "unknown field `attention_factor`"),
        ({"type": "linear"}, "rope_scaling.rope_type: got 'linear'"),
    ):
        with pytest.raises((ConfigError, msgspec.ValidationError), match=said):
            shape_of({**MOONLIGHT, "rope_scaling": {**YARN, **more}})


def test_a_group_must_be_scored_by_two_experts() -> None:
    shape_of({**MOONLIGHT, "n_group": 8, "topk_group": 3})
    with pytest.raises(ConfigError, match="num_experts_per_tok: got 6, expected 8"):
        shape_of({**MOONLIGHT, "n_group": 8, "topk_group": 4})


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe"])
def test_plain_attention_is_rotated_whole(case: str, tmp_path: Path) -> None:
    make_family(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.5
    with pytest.raises(ConfigError, match=r"partial_rotary_factor: got 0\.5, expected None or 1\.0"):
        shape_of(config)


def test_an_unset_share_of_rotation_is_that_of_transformers() -> None:
    config = {name: value for name, value in QWEN3_NEXT_80B.items() if name != "partial_rotary_factor"}
    assert shape_of(config) == shape_of(QWEN3_NEXT_80B)
