"""The tiny checkpoint: transformers loads it, its tokenizer loses nothing, its bytes follow the seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from launch.tiny_model import ANSWER_ID, EOS, EOS_ID, FAMILIES, VOCABULARY, make_tiny, make_tiny_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_transformers_loads_the_weights_as_written(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written, loaded = load_file(folder / "model.safetensors"), model.state_dict()
    assert written.keys() == loaded.keys()
    assert all(np.array_equal(written[name], loaded[name].numpy()) for name in written)
    assert model.generation_config.eos_token_id == EOS_ID
    assert model.config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_in_transformers_and_starts_as_theirs_does(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        make_tiny(family, tmp_path, seed=0), output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.endswith("norm.weight"):
            assert tensor.equal(fresh[name]), name
        if name.endswith("dt_bias"):
            assert 1e-3 <= (step := tensor.exp().log1p()).min() < step.max() <= 0.1, name
        if name.endswith("A_log"):
            assert 0 <= tensor.min() < tensor.max() <= np.log(16), name


def test_the_hybrid_has_a_layer_of_each_kind(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(make_tiny("qwen3_next", tmp_path, seed=0))
    assert config.layer_types == ["linear_attention", "full_attention"]


def test_the_default_family_is_dense(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        assert (
            make_tiny("qwen3", tmp_path, seed=0).joinpath(name).read_bytes() == (folder / name).read_bytes()
        )


def test_transformers_and_tokenizers_agree(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (EOS_ID, EOS_ID)
    text = f"Zoë's ducks, $2 .\n#### 46{EOS}"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded.encode(text, add_special_tokens=False) == ids
    assert loaded.decode(ids) == text
    assert loaded.decode(ids, skip_special_tokens=True) == text.removesuffix(EOS)


def test_an_answer_is_few_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("#### 46" + EOS, add_special_tokens=False).ids
    assert len(ids) == 4
    assert (ids[0], ids[-1]) == (ANSWER_ID, EOS_ID)
    assert tokenizer.decode(ids) == "#### 46"


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < VOCABULARY


def test_gsm8k_comes_back(test_data: Path, tokenizer: Tokenizer) -> None:
    text = (test_data / "gsm8k_test.jsonl").read_text()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_weights_follow_the_seed_and_the_deviation(folder: Path, tmp_path: Path) -> None:
    name = "model.safetensors"
    assert make_tiny_qwen3(tmp_path / "a", seed=0).joinpath(name).read_bytes() == (folder / name).read_bytes()
    other = load_file(make_tiny_qwen3(tmp_path / "b", seed=1, std=0.02) / name)
    assert other["lm_head.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert (other["model.norm.weight"] == 1).all()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["initializer_range"] == 0.02


def test_other_shapes_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = {"hidden": 64, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 64, "intermediate": 96}
    folder = make_tiny_qwen3(tmp_path, seed=0, **shape)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(model.model.layers) == 3
    assert model.num_parameters() == sum(t.size for t in load_file(tmp_path / "model.safetensors").values())


def test_making_it_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from launch.tiny_model import make_tiny_qwen3; "
        "make_tiny_qwen3(Path(sys.argv[1]), seed=0); "
        "sys.exit(bool({'torch', 'transformers', 'megatron', 'sglang'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 0
