"""Every family on GPU kernels against transformers' plain torch, and packed against one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.convert.held import rule_name
from learner.convert.names import rules
from learner.errors import ModelError
from learner.model import inputs
from learner.model.forward import target_logits, target_logprobs
from learner.packing import MicroBatch, pack, row_of_tokens
from learner.step import Trainer
from tests.gpu.cases import CASES, WIDE, hf_tensors, logits_of, logprobs_of, make, sequences
from tests.unit.learner.families import router_margin

Family = tuple[str, Path, torch.nn.Module]

EXACT = [case for case in CASES if case not in ("qwen3_next", "nemotron_h")]
"""Run in fp32. flash-linear-attention's fp32 kernels take minutes to compile, mamba-ssm's are off."""


def make_trainer(folder: Path, tokens: int = 1000, dtype: str = "float32") -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=tokens, dtype=dtype)
    return Trainer(folder, model, OptimizerConfig(), ObjectiveConfig())


def run_dtype(case: str) -> str:
    return "float32" if case in EXACT else "bfloat16"


@pytest.fixture(scope="module", params=list(CASES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param, folder, rounded=request.param not in EXACT)
    assert router_margin(theirs, sequences()) > 1e-4, "a router choice hangs by a thread: another seed"
    return request.param, folder, theirs


def gradients_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What the backward pass left, under Hugging Face names."""
    parameters = {rule_name(name): value for name, value in trainer._model.named_parameters()}
    found = {}
    for rule in rules(trainer._shape):
        if rule.mcore in parameters:  # the router's correction bias is a buffer
            gradient = replace(rule, shift=0.0).split(parameters[rule.mcore].main_grad.float().cpu())
            found |= {part.name: got for part, got in zip(rule.parts, gradient, strict=True)}
    return found


@pytest.mark.parametrize("family", EXACT, indirect=True)
def test_logits_and_gradients_in_fp32_equal_transformers(family: Family) -> None:
    case, folder, theirs = family
    trainer = make_trainer(folder)
    (batch,) = pack([row_of_tokens(sequence, 1) for sequence in sequences()], 1000)
    logits = target_logits(trainer._parallel, batch)
    expected = logits_of(theirs)
    rms = expected.square().mean().sqrt().item()
    error = (logits.detach().cpu() - expected).abs().max().item()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights.cuda()).sum().backward()
    theirs.zero_grad()
    (expected * weights).sum().backward()
    wanted, found = hf_tensors(theirs, gradients=True), gradients_of(trainer)
    assert wanted.keys() == found.keys()
    away = {}
    for name, right in wanted.items():
        assert right.norm() > 0 or ".experts." in name, name  # some expert may be idle
        away[name] = ((found[name] - right).norm() / right.norm().clamp(min=1e-9)).item()
    worst = max(away, key=lambda name: away[name])
    print(f"\n{case}: fp32 logits {error:.1e} at rms {rms:.2f}; worst gradient {away[worst]:.1e} ({worst})")
    assert error <= 1e-4 * max(1.0, rms)
    assert away[worst] <= 1e-3, worst


def test_packed_equals_one_by_one_and_leaks_without_boundaries(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder, _ = family
    trainer = make_trainer(folder, dtype=run_dtype(case))
    together = trainer.score(sequences())
    alone = make_trainer(folder, tokens=1, dtype=run_dtype(case)).score(sequences())
    honest: Callable[[MicroBatch], object] = inputs._sequences

    def leaky(batch: MicroBatch) -> object:
        return honest(
            replace(batch, cu_seqlens_padded=batch.cu_seqlens_padded[[0, -1]], max_length=len(batch.tokens))
        )

    monkeypatch.setattr(inputs, "_sequences", leaky)
    leaking = trainer.score(sequences())
    off = max(np.abs(a - b).max() for a, b in zip(together, alone, strict=True))
    first, *leaks = (np.abs(a - b).max() for a, b in zip(together, leaking, strict=True))
    seen = np.median(leaks)
    print(f"\n{case}: packed against one by one {off:.1e}; without boundaries {seen:.1e}")
    limit = {"float32": 1e-5, "bfloat16": 0.1}[run_dtype(case)]
    assert off <= limit
    assert first <= limit
    assert seen > 5 * limit


def test_a_round_trip_keeps_every_bit(family: Family) -> None:
    case, folder, theirs = family
    exported = make_trainer(folder, dtype=run_dtype(case)).export()
    expected = hf_tensors(theirs)
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor.float(), expected[name]), name


def test_keys_of_a_distributed_checkpoint_are_those_of_the_cpu(family: Family) -> None:
    """The rules give them, and are compared with the CPU's modules in tests/unit/learner/test_names.py."""
    trainer = make_trainer(family[1], dtype=run_dtype(family[0]))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "non_homogeneous_layers": True}
    sharded = trainer._model.sharded_state_dict(metadata=metadata)
    apply_factories(sharded)
    saved = {
        tensor.key: tensor.global_shape[tensor.prepend_axis_num :]
        for tensor in _leaves(sharded)
        if isinstance(tensor, ShardedTensor)
    }
    assert {key: dims for rule in rules(trainer._shape) for key, dims in rule.keys().items()} == saved


@pytest.mark.parametrize("case", [*CASES, *WIDE])
def test_bf16_errs_no_more_than_half_again_transformers(case: str, tmp_path: Path) -> None:
    theirs = make(case, tmp_path, rounded=True)
    exact = run_reference(theirs)
    in_bf16 = run_reference(copy.deepcopy(theirs).bfloat16().cuda())
    trainer = make_trainer(tmp_path, dtype="bfloat16")
    (batch,) = pack([row_of_tokens(sequence, 1) for sequence in sequences()], 1000)
    logprobs, _ = target_logprobs(trainer._parallel, batch, chunk=64)
    (logprobs * cotangents().cuda()).sum().backward()
    ours = errors(exact, (logprobs.detach().cpu(), gradients_of(trainer)))
    allowed = errors(exact, in_bf16)
    for name, got in ours.items():
        print(f"\n{case}: bf16 {name} {got:.4f}, transformers {allowed[name]:.4f}", end="")
    print()
    for name, got in ours.items():
        assert got <= 1.5 * allowed[name], name


def cotangents() -> torch.Tensor:
    """[N]: what the log-probabilities are multiplied by before the backward pass."""
    count = sum(len(sequence) - 1 for sequence in sequences())
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def run_reference(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' log-probabilities and gradients, both in fp32 on the CPU."""
    model.zero_grad()
    logprobs = logprobs_of(model)
    (logprobs * cotangents().to(logprobs.device)).sum().backward()
    gradients = {name: grad.float().cpu() for name, grad in hf_tensors(model, gradients=True).items()}
    return logprobs.detach().cpu(), gradients


def errors(
    exact: tuple[torch.Tensor, dict[str, torch.Tensor]], found: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Mean and 99th percentile of |delta log p|, and the relative error of all gradients together."""
    delta = (found[0] - exact[0]).abs()
    away = sum((found[1][name] - right).square().sum() for name, right in exact[1].items())
    size = sum(right.square().sum() for right in exact[1].values())
    return {
        "mean": delta.mean().item(),
        "p99": delta.quantile(0.99).item(),
        "gradient": (away / size).sqrt().item(),
    }


def test_gates_stay_in_fp32_in_a_bf16_model(tmp_path: Path) -> None:
    make("qwen3_next", tmp_path)
    model = make_trainer(tmp_path, dtype="bfloat16")._model
    kept = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert len(kept) == 3 * 2 + 4  # decays of three layers, routers of four
    assert all(name.endswith(("A_log", "dt_bias", "router.weight")) for name in kept)


def test_a_hybrid_in_fp32_is_refused(tmp_path: Path) -> None:
    make("nemotron_h", tmp_path)
    with pytest.raises(ModelError, match="nemotron_h, expected bfloat16"):
        make_trainer(tmp_path)


def _leaves(tree: object) -> list:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for branch in tree for leaf in _leaves(branch)] if isinstance(tree, list) else [tree]
