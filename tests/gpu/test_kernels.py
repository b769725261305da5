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
from learner.model import forward
from learner.model.forward import target_logits
from learner.packing import MicroBatch, pack, row_of_tokens
from learner.step import Trainer
from tests.gpu.cases import CASES, hf_tensors, logits_of, logprobs_of, make, sequences
from tests.unit.learner.families import router_margin

Family = tuple[str, Path, torch.nn.Module]


def make_trainer(folder: Path, tokens: int = 1000, dtype: str = "float32") -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=tokens, dtype=dtype)
    return Trainer(folder, model, OptimizerConfig(), ObjectiveConfig())


@pytest.fixture(scope="module", params=list(CASES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param, folder)
    assert router_margin(theirs, sequences()) > 1e-4, "a router choice hangs by a thread: another seed"
    return request.param, folder, theirs


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
    wanted = hf_tensors(theirs, gradients=True)
    parameters = {rule_name(name): value for name, value in trainer._model.named_parameters()}
    worst, compared = ("", 0.0), 0
    for rule in rules(trainer._shape):
        if rule.mcore not in parameters:  # the router's correction bias is a buffer
            continue
        gradient = replace(rule, shift=0.0).split(parameters[rule.mcore].main_grad.cpu())
        for part, got in zip(rule.parts, gradient, strict=True):
            right = wanted[part.name]
            assert right.norm() > 0 or ".experts." in part.name, part.name  # some expert may be idle
            away = ((got - right).norm() / right.norm()).item() if right.norm() > 0 else float(got.norm())
            worst = max(worst, (part.name, away), key=lambda pair: pair[1])
            compared += 1
    print(f"\n{case}: fp32 logits {error:.1e} at rms {rms:.2f}; worst gradient {worst[1]:.1e} ({worst[0]})")
    assert error <= 1e-4 * max(1.0, rms)
    assert worst[1] <= 1e-3, worst
    assert compared == len(wanted)


def test_packed_equals_one_by_one(family: Family) -> None:
    together = np.concatenate(make_trainer(family[1]).score(sequences()))
    alone = np.concatenate(make_trainer(family[1], tokens=1).score(sequences()))
    print(f"\n{family[0]}: packed against one by one {np.abs(together - alone).max():.1e}")
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_without_boundaries_a_sequence_sees_its_neighbour(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(family[1])
    sound = trainer.score(sequences())
    honest: Callable[[MicroBatch], object] = forward._boundaries

    def leaky(batch: MicroBatch) -> object:
        length = len(batch.tokens)
        return honest(replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]], max_length=length))

    monkeypatch.setattr(forward, "_boundaries", leaky)
    leaking = trainer.score(sequences())
    np.testing.assert_allclose(leaking[0], sound[0], atol=1e-5)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(leaking[1:], sound[1:], strict=True))


def test_a_round_trip_keeps_every_bit(family: Family) -> None:
    exported = make_trainer(family[1]).export()
    expected = hf_tensors(family[2])
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, expected[name]), name


def test_keys_of_a_distributed_checkpoint_are_those_of_the_cpu(family: Family) -> None:
    """The rules give them, and are compared with the CPU's modules in tests/unit/learner/test_names.py."""
    trainer = make_trainer(family[1])
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


@pytest.mark.parametrize("case", list(CASES))
def test_bf16_errs_no_more_than_half_again_transformers(case: str, tmp_path: Path) -> None:
    theirs = make(case, tmp_path, rounded=True)
    exact = logprobs_of(theirs)
    ours = np.concatenate(make_trainer(tmp_path, dtype="bfloat16").score(sequences()))
    in_bf16 = logprobs_of(copy.deepcopy(theirs).bfloat16().cuda())
    figures = [
        (np.abs(found - exact).mean(), np.quantile(np.abs(found - exact), 0.99)) for found in (ours, in_bf16)
    ]
    (mean, p99), (their_mean, their_p99) = figures
    print(f"\n{case}: bf16 mean {mean:.4f} p99 {p99:.4f}; transformers {their_mean:.4f} {their_p99:.4f}")
    assert mean <= 1.5 * their_mean
    assert p99 <= 1.5 * their_p99


def test_gates_stay_in_fp32_in_a_bf16_model(tmp_path: Path) -> None:
    make("qwen3_next", tmp_path)
    model = make_trainer(tmp_path, dtype="bfloat16")._model
    kept = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert len(kept) == 3 * 2 + 4  # decays of three layers, routers of four
    assert all(name.endswith(("A_log", "dt_bias", "router.weight")) for name in kept)


def _leaves(tree: object) -> list:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for branch in tree for leaf in _leaves(branch)] if isinstance(tree, list) else [tree]
