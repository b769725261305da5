"""The Megatron-Core model against transformers, and the converter both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.errors import ModelError
from learner.model.forward import target_logits
from learner.model.hf_config import read_shape
from learner.packing import pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner.conftest import SMALL

LENGTHS = (5, 33, 2, 17, 60, 9, 3)
"""Ragged, over several of the attention's length classes."""


def make_trainer(folder: Path, **model: int) -> Trainer:
    return Trainer(folder, ModelConfig(path=str(folder), **model), OptimizerConfig(), ObjectiveConfig())


def _sequences() -> list[list[int]]:
    source = np.random.default_rng(0)
    return [source.integers(0, 48, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_transformers(make_checkpoint: Callable, tied: bool, kv_heads: int) -> None:
    folder, theirs = make_checkpoint(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    ours = make_trainer(folder)
    (batch,) = pack([row_of_tokens(sequence, 1) for sequence in _sequences()], 1000)
    with torch.no_grad():
        logits = target_logits(ours._model, batch)
        expected = torch.cat([theirs(torch.tensor([s[:-1]])).logits[0] for s in _sequences()])
    rms = expected.square().mean().sqrt().item()
    assert (logits - expected).abs().max().item() <= 1e-4 * max(1.0, rms)


def test_packed_equals_unpacked(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    together = make_trainer(folder, micro_batch_tokens=1000).score(_sequences())
    alone = make_trainer(folder, micro_batch_tokens=1).score(_sequences())
    for packed, single, length in zip(together, alone, LENGTHS, strict=True):
        assert packed.shape == (length - 1,)
        np.testing.assert_allclose(packed, single, atol=1e-5)


def test_a_sequence_does_not_see_its_neighbours(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    first, second = _sequences()[1], _sequences()[4]
    before = trainer.score([first, second])[1]
    after = trainer.score([[7] * len(first), second])[1]
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_score_divides_by_the_temperature(make_checkpoint: Callable) -> None:
    folder, theirs = make_checkpoint()
    (got,) = make_trainer(folder).score([_sequences()[3]], temperature=0.5)
    tokens = torch.tensor([_sequences()[3]])
    with torch.no_grad():
        logs = (theirs(tokens).logits[0, :-1] / 0.5).log_softmax(-1)
    np.testing.assert_allclose(got, logs.gather(1, tokens[0, 1:, None])[:, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_returns_what_was_loaded(make_checkpoint: Callable, tied: bool) -> None:
    folder, theirs = make_checkpoint(tie_word_embeddings=tied)
    trainer = make_trainer(folder)
    exported = trainer.export()
    expected = theirs.state_dict()
    assert set(exported) == set(expected) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    assert list(exported) == list(trainer.export())
    exported["model.norm.weight"].zero_()
    assert trainer.export()["model.norm.weight"].any(), "export must copy"


def test_a_saved_folder_loads_in_transformers(make_checkpoint: Callable, tmp_path: Path) -> None:
    import transformers

    folder, theirs = make_checkpoint()
    (folder / "tokenizer.json").write_text("{}")
    make_trainer(folder).save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    again, report = transformers.Qwen3ForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    tokens = torch.tensor([_sequences()[3]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_greedy_generation_equals_transformers(make_checkpoint: Callable) -> None:
    folder, theirs = make_checkpoint()
    prompts = [sequence for sequence in _sequences() if len(sequence) > 2]
    got = make_trainer(folder).generate(prompts, max_new_tokens=5, eos_id=-1, temperature=0.0)
    for prompt, answer in zip(prompts, got, strict=True):
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert answer == output[0, len(prompt) :].tolist()


def test_sampling_repeats_with_its_seed_and_stops_at_the_end_token(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    prompts = [[1, 2, 3]] * 64
    first = trainer.generate(prompts, 8, eos_id=5, seed=1)
    assert first == trainer.generate(prompts, 8, eos_id=5, seed=1)
    assert first != trainer.generate(prompts, 8, eos_id=5, seed=2)
    assert len({len(answer) for answer in first}) > 1
    assert not any(5 in answer for answer in first)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("architectures", ["Qwen3MoeForCausalLM"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_an_unsupported_architecture_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    shape = {**SMALL, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **shape}))
    assert read_shape(tmp_path).attention.head_dim == 16
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **shape, field: value}))
    with pytest.raises(ModelError, match=field):
        read_shape(tmp_path)


def test_a_missing_config_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ModelError, match="vocab_size"):
        read_shape(tmp_path)


def _drop(tensors: dict) -> None:
    del tensors["model.layers.1.self_attn.k_norm.weight"]


def _reshape(tensors: dict) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)


def _add(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "model.layers.1.self_attn.k_norm.weight is missing"),
        (_reshape, r"model.layers.0.mlp.up_proj.weight: got shape \(3, 32\), expected \(56, 32\)"),
        (_add, "unknown tensors .*q_proj.bias"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_tensor(
    make_checkpoint: Callable, damage: Callable[[dict], None], message: str
) -> None:
    folder, _ = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        make_trainer(folder)


def test_a_tied_head_stored_twice_must_be_equal(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint(tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    make_trainer(folder)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head.weight differs"):
        make_trainer(folder)
