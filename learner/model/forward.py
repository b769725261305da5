"""Running the model over packed micro-batches: logits of targets, scores, and plain sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from learner.model.attention import PackedSequences
from learner.objective import token_logprobs
from learner.packing import MicroBatch, Row, pack, row_of_tokens


def target_logits(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits [N, V] from which each of the batch's targets is predicted, before temperature.

    Only these positions pass the output layer: with a large vocabulary it is most of the memory.
    """
    return model(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=None,
        packed_seq_params=PackedSequences.of(batch.cu_seqlens),
        output_processor=_project,
        output_processor_context=batch.predictors,
    )


@torch.no_grad()
def score(
    model: torch.nn.Module, sequences: Sequence[Sequence[int]], budget: int, temperature: float
) -> list[np.ndarray]:
    """Log-probability of tokens 1.. of each sequence, float32 [T - 1] each, in the order given."""
    rows = [row_of_tokens(sequence, 1, temperature) for sequence in sequences]
    scores = [np.zeros(0, np.float32) for _ in rows]
    for batch in pack(rows, budget):
        logprobs, _ = token_logprobs(target_logits(model, batch), batch.targets, batch.temperature)
        counts = torch.bincount(batch.sample).tolist()
        for index, part in zip(batch.rows, logprobs.split(counts), strict=True):
            scores[index] = part.numpy()
    return scores


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int,
    budget: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Answers to `prompts`, without `eos_id`; greedy at temperature 0.

    Runs the whole sequence again for every token, which only suits short answers such as those of
    the supervised warm-up. The same seed gives the same answers.
    """
    source = torch.Generator().manual_seed(seed)
    sequences = [list(prompt) for prompt in prompts]
    running = list(range(len(sequences)))
    for _ in range(max_new_tokens):
        # One position is predicted a sequence: the target itself is not known yet, hence the 0.
        rows = [row_of_tokens([*sequences[index], 0], len(sequences[index])) for index in running]
        logits = _last_logits(model, rows, budget)
        for index, token in zip(running, _draw(logits, temperature, source), strict=True):
            sequences[index].append(token)
        running = [index for index in running if sequences[index][-1] != eos_id]
        if not running:
            break
    answers = [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]
    return [answer[:-1] if answer and answer[-1] == eos_id else answer for answer in answers]


def _last_logits(model: torch.nn.Module, rows: list[Row], budget: int) -> torch.Tensor:
    """[len(rows), V]: logits of the one target of each row, in the order of `rows`."""
    batches = pack(rows, budget)
    logits = torch.cat([target_logits(model, batch) for batch in batches])
    order = torch.tensor([index for batch in batches for index in batch.rows])
    return logits[order.argsort()]


def _draw(logits: torch.Tensor, temperature: float, source: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    probabilities = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=source).squeeze(1).tolist()


def _project(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    context: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """`GPTModel`'s output hook: hidden states [T, 1, H] at the predictors `context` [N] to logits [N, V]."""
    logits, _bias = output_layer(hidden_states.index_select(0, context), weight=output_weight)
    return logits.squeeze(1)
