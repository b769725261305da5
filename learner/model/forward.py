"""Running the model over packed micro-batches: log-probabilities of targets, and plain sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from learner.model.inputs import Inputs
from learner.model.output import logits_of, logprobs_of
from learner.model.routing import routed
from learner.model.schedule import forward_only
from learner.model.world import from_rank_0
from learner.packing import MicroBatch, Row, row_of_tokens

Pack = Callable[[Sequence[Row]], list[MicroBatch]]
"""Micro-batches of rows."""


def target_logprobs(
    model: torch.nn.Module, batch: MicroBatch, chunk: int, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [N] of each of the batch's targets after temperature, and entropy [N] there, fp32.

    The output layer runs over `chunk` targets at a time; see `learner.model.output`. On a pipeline stage
    other than the last: the stage's hidden states, for the next one (`learner.model.schedule`).
    """
    return _run(model, batch, partial(logprobs_of, chunk=chunk, entropy_gradient=entropy_gradient))


def of_logprobs(output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The log-probabilities in what `target_logprobs` gives, on the CPU."""
    return output[0].cpu()


def target_logits(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits [N, V] from which each of the batch's targets is predicted, before temperature.

    All of them at once: for what samples or compares whole distributions, not for training. On a pipeline
    stage other than the last: its hidden states.
    """
    return _run(model, batch, logits_of)


@torch.no_grad()
def score(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    pack: Pack,
    temperature: float,
    chunk: int,
) -> list[np.ndarray]:
    """Log-probability of tokens 1.. of each sequence, float32 [T - 1] each, in the order given."""
    rows = [row_of_tokens(sequence, 1, temperature) for sequence in sequences]
    scores = [np.zeros(0, np.float32) for _ in rows]
    batches = pack(rows)
    found = forward_only(model, batches, partial(target_logprobs, model, chunk=chunk), of_logprobs)
    for batch, logprobs in zip(batches, found, strict=True):
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
    pack: Pack,
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
        logits = _last_logits(model, rows, pack)
        # Logits of several copies may differ in their last bit, where copies share experts.
        drawn = from_rank_0(_draw(logits, temperature, source))
        for index, token in zip(running, drawn, strict=True):
            sequences[index].append(token)
        running = [index for index in running if sequences[index][-1] != eos_id]
        if not running:
            break
    answers = [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]
    return [answer[:-1] if answer and answer[-1] == eos_id else answer for answer in answers]


def _last_logits(model: torch.nn.Module, rows: list[Row], pack: Pack) -> torch.Tensor:
    """[len(rows), V]: logits of the one target of each row, in the order of `rows`."""
    batches = pack(rows)
    found = forward_only(model, batches, partial(target_logits, model), lambda logits: logits.float().cpu())
    logits = torch.cat(found)
    order = torch.tensor([index for batch in batches for index in batch.rows])
    return logits[order.argsort()]


def _draw(logits: torch.Tensor, temperature: float, source: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    probabilities = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=source).squeeze(1).tolist()


def _run(model: torch.nn.Module, batch: MicroBatch, output: Callable[..., Any]) -> Any:
    """`output` of the model's last hidden states; only the predictors' pass the output layer."""
    inputs = Inputs.of(batch.to(next(model.parameters()).device))
    with routed(model, inputs.batch.routed):
        result = model(
            input_ids=inputs.batch.tokens[None],
            position_ids=inputs.batch.positions[None],
            attention_mask=None,
            packed_seq_params=inputs.sequences,
            output_processor=partial(_processor, output),
            output_processor_context=inputs.batch,
        )
    if not parallel_state.is_pipeline_last_stage():
        return result
    return tuple(map(inputs.whole, result)) if isinstance(result, tuple) else inputs.whole(result)


def _processor(
    output: Callable[..., Any],
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    context: MicroBatch,
    **_: Any,
) -> Any:
    """`GPTModel`'s hook in place of its output layer."""
    return output(hidden_states, output_layer, output_weight, context)
