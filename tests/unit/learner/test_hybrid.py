"""Nemotron-H: what of it needs no GPU, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.convert.folders import hf_to_mcore, mcore_to_hf
from learner.convert.held import rule_name
from learner.convert.hf import HfFolder, check_coverage
from learner.convert.names import rules
from learner.errors import ModelError
from learner.model import build
from learner.model.build import build_model
from learner.model.hf_config import read_shape
from learner.model.shape import Attention, Hybrid, Mamba
from tests.gpu.cases import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nemotron_h")
    make("nemotron_h", made)
    return made


def test_its_config_is_read(folder: Path) -> None:
    shape = read_shape(folder)
    assert shape.hybrid == Hybrid("M*M-", Mamba(heads=8, head_dim=16, groups=2, state=32, kernel=4, chunk=64))
    assert shape.attention == Attention(4, 2, 32, rotary=0.0)
    assert shape.layers == ()


def test_the_older_spelling_of_layers_says_the_same(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["layers_block_type"]
    older = {**config, "hybrid_override_pattern": "M*M-", "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert read_shape(tmp_path) == read_shape(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers_block_type", ["mamba", "moe"]),
        ("layers_block_type", []),
        ("layer_norm_epsilon", 1e-6),
        ("mlp_hidden_act", "silu"),
        ("use_conv_bias", False),
        ("time_step_limit", [0.0, 1.0]),
        ("num_nextn_predict_layers", 1),
        ("sliding_window", 128),
        ("rope_theta_of_another", 1.0),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(folder: Path, tmp_path: Path, field: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ModelError, match=rf"config\.json: .*{field}"):
        read_shape(tmp_path)


def test_the_rules_cover_what_transformers_has(folder: Path) -> None:
    check_coverage(HfFolder(folder), read_shape(folder))


def test_conversion_there_and_back_keeps_every_bit(folder: Path, tmp_path: Path) -> None:
    def quiet(*_: object) -> None: ...

    hf_to_mcore(folder, tmp_path / "mcore", quiet)
    mcore_to_hf(tmp_path / "mcore", folder, tmp_path / "back", quiet)
    before, after = HfFolder(folder), HfFolder(tmp_path / "back")
    assert before.shapes == after.shapes
    for name in before.shapes:
        assert torch.equal(before.tensor(name), after.tensor(name)), name


def test_keys_are_those_of_megatron_core(folder: Path) -> None:
    """Its mixer stores projection and convolution in sections, and calls the convolution `conv1d`."""
    keys = {key for rule in rules(read_shape(folder)) for key in rule.keys()}  # noqa: SIM118 (a rule)
    mixer = "decoder.layers.0.mixer."
    sections = {f"{mixer}in_proj.weight.{name}" for name in ("z", "x", "B", "C", "dt")}
    sections |= {f"{mixer}conv1d.{kind}.{name}" for kind in ("weight", "bias") for name in ("x", "B", "C")}
    assert sections <= keys
    assert not any("conv1d_" in key for key in keys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without a GPU")
def test_without_a_gpu_it_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model_type nemotron_h: got a host without a GPU.*mamba-ssm"):
        build_model(read_shape(folder))


@pytest.mark.skipif(build.HAVE_TE, reason="about hosts without Transformer Engine")
def test_a_gpu_without_transformer_engine_is_refused() -> None:
    with pytest.raises(ModelError, match="without Transformer Engine"):
        build._gpu()


def test_grouped_experts_have_the_names_of_single_ones() -> None:
    name = "decoder.layers.1.mlp.experts.linear_fc1.weight12"
    assert rule_name(name) == "decoder.layers.1.mlp.experts.local_experts.12.linear_fc1.weight"
    assert rule_name("decoder.layers.1.mlp.router.weight") == "decoder.layers.1.mlp.router.weight"
