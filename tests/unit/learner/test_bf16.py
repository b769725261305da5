"""bf16 on Megatron-Core against transformers' own, both measured from fp32, and the weights beneath it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.convert.hf import HfFolder
from learner.model.forward import target_logprobs
from learner.model.routing import replay_routing
from learner.packing import Row, pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner.families import make_family, stored_tensors
from tests.unit.learner.test_checkpoint import save
from tests.unit.learner.test_step import batch_of, digest

FAMILIES = ["qwen3", "qwen3_moe", "qwen3_next", "deepseek_v3", "moonlight"]
Choices = list[list[torch.Tensor]]
"""Of each sequence and layer with experts int64 [T, k]: those that each token is sent to."""


def sequences() -> list[list[int]]:
    source = np.random.default_rng(0)
    return [source.integers(0, 48, length).tolist() for length in (5, 33, 180, 17, 240, 66, 128)]


def make_trainer(folder: Path, dtype: str = "bfloat16", lr: float = 1e-3) -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=2000, dtype=dtype)
    return Trainer(folder, model, OptimizerConfig(lr=lr, warmup_steps=0), ObjectiveConfig())


def rounded_family(case: str, folder: Path) -> torch.nn.Module:
    """A checkpoint of fp32 tensors whose values bf16 has, too; returns transformers' model in fp32."""
    model = make_family(case, folder)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.copy_(tensor.bfloat16())
    model.save_pretrained(folder)
    return model


def routed(theirs: torch.nn.Module, see: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Makes every router of transformers' model send tokens to the experts [T, k] that `see` returns.

    `see` is called with those that it would choose, layer by layer.
    """
    for name, module in theirs.named_modules():
        if name.endswith("mlp") and hasattr(module, "route_tokens_to_experts"):
            module.route_tokens_to_experts = _latent_route(module, module.route_tokens_to_experts, see)
        elif name.endswith("mlp.gate") and not hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(_gate_hook(see))


def _gate_hook(see: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def hook(gate: torch.nn.Module, _inputs: object, output: Any) -> Any:
        logits, _, own = output
        chosen = see(own)
        weights = logits.softmax(dim=-1, dtype=torch.float32).gather(1, chosen)
        if gate.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), chosen

    return hook


def _latent_route(module: torch.nn.Module, own: Callable, see: Callable) -> Callable[..., Any]:
    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = see(own(logits)[0])
        weights = logits.sigmoid().gather(1, chosen)
        if module.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * module.routed_scaling_factor

    return route


def theirs_with(model: torch.nn.Module, choices: Choices | None) -> tuple[np.ndarray, Choices]:
    """transformers' log-probabilities of all tokens, in fp32 from its logits, and the experts it used."""
    used: Choices = []

    def see(own: torch.Tensor) -> torch.Tensor:
        chosen = own if choices is None else choices[len(used) - 1][len(used[-1])]
        used[-1].append(chosen)
        return chosen

    routed(model, see)
    values = []
    with torch.no_grad():
        for sequence in sequences():
            used.append([])
            logs = model(torch.tensor([sequence[:-1]])).logits[0].float().log_softmax(-1)
            values.append(logs.gather(1, torch.tensor(sequence[1:])[:, None]).squeeze(1))
    return torch.cat(values).numpy(), used


def rows_with(trainer: Trainer, choices: Choices) -> list[Row]:
    rows, layers = [row_of_tokens(sequence, 1) for sequence in sequences()], trainer._shape.layers
    experts = [index for index, layer in enumerate(layers) if layer.experts]
    if not experts:
        return rows
    replay_routing(trainer._model, trainer._shape)
    chosen = [np.zeros((len(own[0]), len(layers), own[0].shape[1]), np.uint16) for own in choices]
    for one, own in zip(chosen, choices, strict=True):
        one[:, experts] = torch.stack(own, dim=1).numpy()
    return [replace(row, routed=one) for row, one in zip(rows, chosen, strict=True)]


def ours_with(trainer: Trainer, choices: Choices) -> np.ndarray:
    (batch,) = pack(rows_with(trainer, choices), 2000)
    with torch.no_grad():
        return target_logprobs(trainer._parallel, batch, 256)[0].numpy()


@pytest.mark.parametrize("case", FAMILIES)
def test_bf16_is_as_near_to_fp32_as_transformers_is(case: str, tmp_path: Path) -> None:
    model = rounded_family(case, tmp_path)
    exact, choices = theirs_with(model, None)
    model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    theirs = np.abs(theirs_with(model, choices)[0] - exact)
    assert theirs.mean() > 1e-4
    np.testing.assert_allclose(ours_with(make_trainer(tmp_path, "float32"), choices), exact, atol=1e-4)
    ours = np.abs(ours_with(make_trainer(tmp_path), choices) - exact)
    assert ours.mean() <= 1.5 * theirs.mean()
    assert np.quantile(ours, 0.99) <= 1.5 * np.quantile(theirs, 0.99)
    mean, tail = ours.mean() / theirs.mean(), np.quantile(ours, 0.99) / np.quantile(theirs, 0.99)
    print(f"\n{case}: error over transformers', mean {mean:.2f}, p99 {tail:.2f}")


def test_gates_stay_in_fp32(tmp_path: Path) -> None:
    make_family("qwen3_next", tmp_path)
    dtypes = {name: value.dtype for name, value in make_trainer(tmp_path)._model.named_parameters()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert len(exact) == 3 * 2 + 4  # decays of three layers, routers of four
    assert all(name.endswith(("A_log", "dt_bias", "router.weight")) for name in exact)
    assert {dtypes[name] for name in dtypes.keys() - exact} == {torch.bfloat16}


def test_an_export_has_the_dtypes_of_the_model(tmp_path: Path) -> None:
    """So a version is as large as the model, and its file what transformers calls a bf16 checkpoint."""
    theirs = rounded_family("qwen3_next", tmp_path / "model")
    trainer = make_trainer(tmp_path / "model")
    trainer.save(tmp_path / "export")
    exact = ("A_log", "dt_bias", "linear_attn.norm.weight", "mlp.gate.weight")
    exported, stored = trainer.export(), HfFolder(tmp_path / "export")
    for name, expected in stored_tensors(theirs).items():
        kind = torch.float32 if name.endswith(exact) else torch.bfloat16
        assert (exported[name].dtype, stored.dtype(name)) == (kind, kind), name
        assert torch.equal(exported[name].float(), expected), name
        assert torch.equal(stored.tensor(name), exported[name]), name


def test_steps_too_small_for_bf16_add_up(tmp_path: Path) -> None:
    """Of weights around 0.1 the next one in bf16 is 5e-4 away."""
    rounded_family("qwen3", tmp_path)
    trainer = make_trainer(tmp_path, lr=1e-5)
    before = [value.detach().clone() for value in trainer._model.parameters()]
    moved = []
    for step in range(30):
        trainer.train_step(batch_of(step % 2), step)
        weights = list(trainer._model.parameters())
        moved.append(sum(int((a != b).sum()) for a, b in zip(weights, before, strict=True)))
    assert moved[0] < 0.1 * moved[-1]
    for value in weights:
        assert value.main_param.dtype == torch.float32
        assert torch.equal(value, value.main_param.bfloat16())
        assert not torch.equal(value, value.main_param)


def test_a_snapshot_has_the_bits_below_bf16(tmp_path: Path) -> None:
    rounded_family("qwen3", tmp_path)
    trainer = make_trainer(tmp_path, lr=1e-4)
    trainer.train_step(batch_of(0), 0)
    kept, digests = trainer.snapshot(), []
    for _ in range(2):
        for step in (1, 2, 3):
            trainer.train_step(batch_of(step), step)
        digests.append(digest(trainer) + str(sum(float(value.double().sum()) for value in trainer._exact())))
        trainer.restore(kept)
    assert digests[0] == digests[1]


def test_a_checkpoint_has_the_bits_below_bf16(tmp_path: Path) -> None:
    rounded_family("qwen3_next", tmp_path / "model")
    trainer = make_trainer(tmp_path / "model", lr=1e-4)
    for step in range(2):
        trainer.train_step(batch_of(step), step)
    again = make_trainer(tmp_path / "model", lr=1e-4)
    again.load_checkpoint(save(trainer, tmp_path / "saved"))
    for one in (trainer, again):
        one.train_step(batch_of(2), 2)
    assert all(map(torch.equal, again._exact(), trainer._exact()))
    assert digest(again) == digest(trainer)
