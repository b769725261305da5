"""Gated DeltaNet as the CPU engine computes it, against transformers' layer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from actors.sglang_cpu.delta_rule import (
    add_gated,
    as_heads,
    convolve,
    delta_rule,
    gated_rms_norm,
    gates,
    split_projections,
    step,
)

HEADS, VALUE_HEADS, KEY, VALUE, TAPS, HIDDEN = 2, 6, 8, 12, 4, 24


@pytest.fixture(scope="module")
def layer() -> Qwen3NextGatedDeltaNet:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=VALUE_HEADS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        linear_conv_kernel_dim=TAPS,
    )
    layer = Qwen3NextGatedDeltaNet(config, layer_idx=0).float().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


class States:
    """What the pools hold for a batch of sequences."""

    def __init__(self, batch: int) -> None:
        self.past = torch.zeros(batch, 2 * HEADS * KEY + VALUE_HEADS * VALUE, TAPS - 1)
        self.state = torch.zeros(batch, VALUE_HEADS, VALUE, KEY)


def forward(
    layer: Qwen3NextGatedDeltaNet, hidden: torch.Tensor, counts: torch.Tensor, states: States
) -> torch.Tensor:
    """One call of the layer on [B, T, X] tokens of which `counts` are real, with states from the last one."""
    batch, length, _ = hidden.shape
    flat = hidden.flatten(0, 1)
    qkvz, ba = layer.in_proj_qkvz(flat), layer.in_proj_ba(flat)
    mixed, z, b, a = split_projections(qkvz, ba, HEADS, VALUE_HEADS, KEY, VALUE)
    x = mixed.unflatten(0, (batch, length))
    x, states.past = convolve(x, layer.conv1d.weight.squeeze(1), None, states.past, counts)
    tokens = as_heads(x, HEADS, VALUE_HEADS, KEY)
    real = (torch.arange(length) < counts[:, None])[..., None]
    g, beta = (gate.unflatten(0, (batch, length)) * real for gate in gates(a, b, layer.A_log, layer.dt_bias))
    if length == 1:
        one = type(tokens)(*(part[:, 0] for part in tokens))
        out, states.state = step(one, g[:, 0], beta[:, 0], states.state)
    else:
        out, states.state = delta_rule(tokens, g, beta, states.state)
    normed = gated_rms_norm(
        out.reshape(-1, VALUE),
        z.reshape(-1, VALUE),
        layer.norm.weight,
        None,
        "silu",
        eps=layer.norm.variance_epsilon,
    )
    return layer.out_proj(normed.view(batch, length, -1))


@pytest.mark.parametrize(
    "cuts", [(0, 140), (0, 70, 75, 76, 77, 140), (0, 64, 128, 140), (0, 1, 2, 3, 4, 140)]
)
def test_a_sequence_in_any_pieces_is_that_of_transformers(layer, cuts: tuple[int, ...]) -> None:
    hidden, states = torch.randn(3, cuts[-1], HIDDEN), States(3)
    with torch.no_grad():
        expected = layer(hidden)
        pieces = [
            forward(layer, hidden[:, start:end], torch.full((3,), end - start), states)
            for start, end in pairwise(cuts)
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=2e-5, rtol=1e-4)


def test_padding_changes_neither_outputs_nor_states(layer) -> None:
    counts, hidden = torch.tensor([1, 130, 2, 64]), torch.randn(4, 130, HIDDEN)
    later, states = torch.randn(4, 1, HIDDEN), States(4)
    with torch.no_grad():
        first = forward(layer, hidden, counts, states)
        then = forward(layer, later, torch.ones(4, dtype=torch.long), states)
        for index, count in enumerate(counts.tolist()):
            alone = layer(torch.cat((hidden[index, :count], later[index]))[None])[0]
            torch.testing.assert_close(first[index, :count], alone[:-1], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(then[index], alone[-1:], atol=2e-5, rtol=1e-4)


def test_the_shared_expert_is_added_under_its_gate() -> None:
    x, gate, shared, routed = torch.randn(5, 8), torch.randn(8), torch.randn(5, 8), torch.randn(5, 8)
    expected = routed + torch.sigmoid(x @ gate)[:, None] * shared
    add_gated(x, gate, shared, routed)
    torch.testing.assert_close(routed, expected)


@pytest.mark.parametrize(("bias", "activation"), [(None, "sigmoid"), (torch.zeros(4), "silu")])
def test_another_output_gate_is_refused(bias: torch.Tensor | None, activation: str) -> None:
    with pytest.raises(ValueError, match=f"the output gate is {activation}"):
        gated_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), bias, activation, eps=1e-6)
