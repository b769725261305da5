"""Every family against transformers' own implementation of it, and packing against one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.ssm.gated_delta_net import gdn

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.convert.names import rules
from learner.model import inputs
from learner.model.forward import target_logits, target_logprobs
from learner.packing import pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner.families import CASES, make_family, router_margin, stored_tensors

LENGTHS = (5, 33, 2, 150, 17, 66, 9)
"""Ragged; of gated DeltaNet's chunks of 64 tokens, some have a part of one, some two or three."""

Family = tuple[Path, torch.nn.Module]


def sequences() -> list[list[int]]:
    source = np.random.default_rng(0)
    return [source.integers(0, 48, length).tolist() for length in LENGTHS]


def make_trainer(folder: Path, tokens: int = 1000) -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=tokens)
    return Trainer(folder, model, OptimizerConfig(), ObjectiveConfig())


@pytest.fixture(scope="module", params=list(CASES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_family(request.param, folder)
    assert router_margin(theirs, sequences()) > 1e-4, "a router choice hangs by a thread: another seed"
    return folder, theirs


def test_logits_and_gradients_equal_transformers(family: Family) -> None:
    folder, theirs = family
    trainer = make_trainer(folder)
    (batch,) = pack([row_of_tokens(sequence, 1) for sequence in sequences()], 1000)
    logits = target_logits(trainer._parallel, batch)
    expected = torch.cat([theirs(torch.tensor([s[:-1]])).logits[0] for s in sequences()])
    rms = expected.square().mean().sqrt().item()
    off = (logits - expected).abs().max().item()
    assert off <= 1e-4 * max(1.0, rms)

    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    theirs.zero_grad()
    (expected * weights).sum().backward()
    wanted = stored_tensors(theirs, gradients=True)
    parameters = dict(trainer._model.named_parameters())
    compared, worst = 0, 0.0
    for rule in rules(trainer._shape):
        if rule.mcore not in parameters:  # the router's correction bias is a buffer
            continue
        gradient = replace(rule, shift=0.0).split(parameters[rule.mcore].main_grad)
        for part, got in zip(rule.parts, gradient, strict=True):
            right = wanted[part.name]
            assert right.norm() > 0 or ".experts." in part.name, part.name  # some expert may be idle
            assert (got - right).norm() <= 1e-3 * right.norm(), part.name
            compared, worst = compared + 1, max(worst, float((got - right).norm() / (right.norm() or 1)))
    assert compared == len(wanted)
    print(f"\n{folder.name}: logits {off:.1e} off at rms {rms:.2f}, gradients {worst:.1e}")


def test_packed_equals_unpacked(family: Family) -> None:
    trainer = make_trainer(family[0])
    together = trainer.score(sequences())
    alone = make_trainer(family[0], tokens=1).score(sequences())
    for packed, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(packed, single, atol=1e-5)


def test_padding_for_a_layout_changes_nothing(family: Family) -> None:
    rows = [row_of_tokens(sequence, 1) for sequence in sequences()]
    found = []
    for context, tensor in ((1, 1), (3, 5)):
        trainer = make_trainer(family[0])
        (batch,) = pack(rows, 1000, context=context, tensor=tensor)
        logprobs, _ = target_logprobs(trainer._parallel, batch, 1000)
        logprobs.sum().backward()
        gradient = torch.cat([value.main_grad.flatten() for value in trainer._model.parameters()])
        found.append((len(batch.tokens), logprobs.detach(), gradient))
    (plain, expected, right), (padded, got, gradient) = found
    assert plain < padded
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (gradient - right).abs().max() <= 1e-5 * right.abs().max()


def test_a_round_trip_keeps_every_bit(family: Family) -> None:
    folder, theirs = family
    exported = make_trainer(folder).export()
    expected = stored_tensors(theirs)
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, expected[name]), name


RESETS = {
    "convolution": (gdn, "causal_conv1d"),
    "state": (gdn, "chunk_gated_delta_rule"),
    "attention": (inputs.PackedSequences, "of"),
}
"""What starts afresh at a sequence's beginning, and the function that is told where."""


@pytest.mark.parametrize("family", ["qwen3_next"], indirect=True)
@pytest.mark.parametrize("place", list(RESETS))
def test_without_its_resets_a_sequence_sees_its_neighbour(
    family: Family, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(family[0])
    sound = trainer.score(sequences())
    monkeypatch.setattr(*RESETS[place], _leaky(getattr(*RESETS[place])))
    if place == "state":  # every layer has taken hold of the function
        for layer in trainer._model.decoder.layers[:3]:
            monkeypatch.setattr(layer.self_attention, "gated_delta_rule", gdn.chunk_gated_delta_rule)
    leaking = trainer.score(sequences())
    np.testing.assert_allclose(leaking[0], sound[0], atol=1e-5)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(leaking[1:], sound[1:], strict=True))


def _leaky(function: Callable) -> Callable:
    """`function` without its knowledge of where sequences begin: one that holds all tokens."""

    def leaky(*args: torch.Tensor, **kwargs: object) -> object:
        if "cu_seqlens" in kwargs:
            return function(*args, **{**kwargs, "cu_seqlens": kwargs["cu_seqlens"][[0, -1]]})
        return function(args[0][[0, -1]])

    return leaky
