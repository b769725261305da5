"""Names and layouts: every tensor once, both ways, in Megatron-Core's own model and checkpoints."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from safetensors.torch import load_file, save_file

from learner.convert.names import hf_shapes, mtp_rules, rules
from learner.convert.rule import Part, Rule
from learner.errors import ModelError
from learner.model.build import build_model, transformer_config
from learner.model.hf_config import read_shape, shape_of
from learner.model.shape import Shape
from learner.model.spec import CpuBackend, block_spec
from tests.unit.learner.families import CASES, make_family
from tests.unit.learner.test_families import make_trainer

QWEN3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""config.json of Qwen3-Next-80B-A3B."""


@pytest.fixture(scope="module", params=list(CASES))
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shape:
    folder = tmp_path_factory.mktemp(request.param)
    make_family(request.param, folder)
    return read_shape(folder)


def test_every_tensor_of_the_80b_model_once_in_seconds() -> None:
    started = time.perf_counter()
    shape = shape_of(QWEN3_NEXT_80B)
    trained, carried = list(rules(shape)), list(mtp_rules(shape))
    parts = [part for rule in (*trained, *carried) for part in rule.parts]
    assert time.perf_counter() - started < 10
    assert max(Counter(part.name for part in parts).values()) == 1
    assert max(Counter(rule.mcore for rule in (*trained, *carried)).values()) == 1
    count = sum(len(rule.parts) for rule in trained)
    size = 2 * sum(part.size for part in parts[:count])
    assert (count, len(parts)) == (74_391, 75_944)
    assert round(size / 1e9, 3) == 159.349
    assert round(2 * sum(part.size for part in parts) / 1e9, 2) == 162.65


def test_the_80b_shapes_are_those_of_megatron_core() -> None:
    shapes = {rule.mcore: rule.shape for rule in rules(shape_of(QWEN3_NEXT_80B))}
    attention, delta_net = "decoder.layers.3.self_attention.", "decoder.layers.0.self_attention."
    assert shapes[attention + "linear_qkv.weight"] == (9216, 2048)
    assert shapes[delta_net + "in_proj.weight"] == (12352, 2048)
    assert shapes[delta_net + "conv1d.weight"] == (8192, 1, 4)
    assert shapes["decoder.layers.0.mlp.experts.local_experts.511.linear_fc1.weight"] == (1024, 2048)


def test_rules_cover_the_model_and_nothing_else(shape: Shape) -> None:
    state = build_model(shape).state_dict(keep_vars=True)
    model = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert {rule.mcore: rule.shape for rule in rules(shape)} == model


def test_keys_are_those_of_a_distributed_checkpoint(shape: Shape) -> None:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "non_homogeneous_layers": True}
    sharded = build_model(shape).sharded_state_dict(metadata=metadata)
    apply_factories(sharded)
    saved = {
        tensor.key: tensor.global_shape[tensor.prepend_axis_num :]
        for tensor in _leaves(sharded)
        if isinstance(tensor, ShardedTensor)
    }
    assert dict(itertools.chain.from_iterable(rule.keys().items() for rule in rules(shape))) == saved


def _leaves(tree: object) -> list:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for branch in tree for leaf in _leaves(branch)] if isinstance(tree, list) else [tree]


def test_orders_are_permutations_and_split_undoes_merge(shape: Shape) -> None:
    for rule in rules(shape):
        parts = [torch.randn(part.shape) for part in rule.parts]
        merged = rule.merge(parts)
        assert tuple(merged.shape) == rule.shape, rule.mcore
        assert rule.order is None or sorted(rule.order.tolist()) == list(range(rule.shape[0]))
        for part, back in zip(parts, rule.split(merged), strict=True):
            torch.testing.assert_close(back, part, atol=1e-6, rtol=0)


def test_a_shifted_gain_comes_back_bit_by_bit() -> None:
    """In fp32: gains in [0.5, 2], and all that bf16 holds down to 2**-16."""
    rule = Rule("out_norm.weight", (Part("norm.weight", (9000,)),), shift=-1.0)
    near = torch.rand(9000) * 1.5 + 0.5
    coarse = torch.randn(9000).bfloat16().float()
    coarse[coarse.abs() < 2**-16] = 0.0
    for gain in (near, coarse, -coarse):
        assert torch.equal(rule.split(rule.merge([gain]))[0], gain)


def test_multi_token_prediction_has_megatron_cores_names(tmp_path: Path) -> None:
    make_family("qwen3_next", tmp_path)
    shape = read_shape(tmp_path)
    config = transformer_config(shape)
    config.mtp_num_layers = 1
    spec = block_spec(shape, config, range(len(shape.layers)))
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=get_gpt_mtp_block_spec_for_backend(config, spec, CpuBackend()),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_length,
        position_embedding_type="rope",
    )
    names = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith("mtp.")}
    assert {rule.mcore: rule.shape for rule in mtp_rules(shape)} == names


@pytest.mark.parametrize(
    ("case", "prefix", "outside"),
    [
        (
            "qwen3_next",
            "mtp.",
            {"fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.mlp.gate"},
        ),
        (
            "deepseek_v3",
            "model.layers.2.",
            {"eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens", "mlp.gate"},
        ),
    ],
)
def test_multi_token_prediction_has_the_names_of_published_checkpoints(
    case: str, prefix: str, outside: set[str], tmp_path: Path
) -> None:
    make_family(case, tmp_path)
    names = hf_shapes(read_shape(tmp_path), mtp=True).keys()
    assert all(name.startswith(prefix) for name in names)
    known = (".experts.", ".shared_expert", "self_attn.", "_layernorm.", "correction_bias")
    short = {
        name.removeprefix(prefix).removesuffix(".weight")
        for name in names
        if not any(k in name for k in known)
    }
    assert short == outside


def _add_mtp(folder: Path) -> dict[str, torch.Tensor]:
    extra = {
        name: torch.randn(dims).bfloat16() for name, dims in hf_shapes(read_shape(folder), mtp=True).items()
    }
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors")
    return extra


@pytest.mark.parametrize("case", ["qwen3_next", "deepseek_v3"])
def test_multi_token_prediction_is_copied_through_and_not_sent(tmp_path: Path, case: str) -> None:
    make_family(case, tmp_path / "in")
    extra = _add_mtp(tmp_path / "in")
    assert extra
    trainer = make_trainer(tmp_path / "in")
    assert not trainer.export().keys() & extra.keys()
    trainer.save(tmp_path / "out")
    saved, given = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "in"))
    assert saved.keys() == given.keys()
    assert all(saved[name].dtype == given[name].dtype for name in given)
    assert all(torch.equal(saved[name], given[name]) for name in given)
    make_trainer(tmp_path / "out")


def test_half_of_multi_token_prediction_is_refused(tmp_path: Path) -> None:
    make_family("qwen3_next", tmp_path)
    extra = _add_mtp(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["mtp.fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"mtp.fc.weight is missing, expected shape \(32, 64\)"):
        make_trainer(tmp_path)
    tensors["mtp.fc.weight"] = extra["mtp.fc.weight"].mT.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"mtp.fc.weight: got shape \(64, 32\), expected \(32, 64\)"):
        make_trainer(tmp_path)
