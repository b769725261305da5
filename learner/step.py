"""One optimizer step: groups in, a new policy version and its metrics out.

Worked example::

    trainer = Trainer(Path("model"), ModelConfig(path="model"), OptimizerConfig(), ObjectiveConfig())
    trainer.version                         # 0
    metrics = trainer.train_step(groups, step=0)
    trainer.version                         # 1
    trainer.export()                        # weights of version 1 under Hugging Face names
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buffer.schema import Group
from learner.advantage import advantages
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.convert.hf import export_hf, load_hf, save_hf
from learner.errors import BatchError
from learner.metrics import TokenRecord
from learner.model.build import build_model, data_parallel
from learner.model.forward import generate, score, target_logits
from learner.model.hf_config import read_shape
from learner.model.optimizer import build_optimizer, clip_gradients, learning_rate, update
from learner.model.world import sum_over_ranks
from learner.objective import Totals, objective, token_logprobs
from learner.packing import MicroBatch, pack, row_of_tokens, rows_of_groups


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of everything a step changes, to go back to."""

    weights: list[torch.Tensor]
    """Copies of the parameters, in the model's order."""
    optimizer: dict[str, Any]
    """A copy of the optimizer's moments and counters, by parameter number."""
    version: int
    """The version that was current."""


class Trainer:
    """A model, its optimizer and the number of steps they have taken."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        objective: ObjectiveConfig,
        seed: int = 0,
    ) -> None:
        """Build the model of the checkpoint in `folder` and load its weights.

        `seed` only drives the control run's permutation. Raises `ModelError` for a checkpoint that
        cannot be trained exactly.
        """
        if objective.mode == "decoupled" and (objective.clip_low, objective.clip_high) != (0.2, 0.2):
            warnings.warn(
                "objective.clip_low / clip_high have no effect in mode `decoupled` with one optimizer step a "
                "batch, where the ratio is 1; the correction bounds the step instead",
                stacklevel=2,
            )
        self.version = 0
        """v: optimizer steps taken, skipped ones included; the weights are those of version v."""
        self._folder = folder
        self._budget = model.micro_batch_tokens
        self._schedule = optimizer
        self._objective = objective
        self._seed = seed
        self._shape = read_shape(folder)
        self._model = build_model(self._shape)
        load_hf(self._model, self._shape, folder)
        self._parallel = data_parallel(self._model)
        self._optimizer = build_optimizer(self._parallel, optimizer)

    def train_step(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Train version `step` on `groups` and return the metrics; the version is `step` + 1 afterwards.

        Groups are taken in the order of their ids, so arrival order cannot matter. A gradient whose
        norm is not finite changes no weight and is reported as `skipped` 1. Raises `BatchError` for a
        step other than the current version, no groups, or a group of fewer than 2 samples.
        """
        started = time.perf_counter()
        if step != self.version:
            raise BatchError(f"step {step}: the weights are version {self.version}; train that step first")
        if not groups:
            raise BatchError(f"step {step}: got 0 groups, expected at least 1; wait for a batch")
        groups = sorted(groups, key=lambda group: group.id)
        rows = rows_of_groups(groups, self._advantages(groups, step), step)
        batches = pack(rows, self._budget)
        packed = time.perf_counter()
        record = TokenRecord()
        totals = Totals(*sum_over_ranks(_sizes(batches)))
        self._accumulate(batches, lambda batch: self._loss(batch, totals, record))
        accumulated = time.perf_counter()
        lr = learning_rate(self._schedule, step)
        norm = self._update(lr)
        self.version += 1
        finished = time.perf_counter()
        return {
            **record.summary(),
            **_group_metrics(groups, step),
            "lr": lr,
            "grad_norm": norm,
            "skipped": float(not math.isfinite(norm)),
            "micro_batches": float(len(batches)),
            "seconds": finished - started,
            "seconds_pack": packed - started,
            "seconds_gradient": accumulated - packed,
            "seconds_update": finished - accumulated,
        }

    def sft_step(self, samples: Sequence[tuple[list[int], list[int]]], lr: float) -> dict[str, float]:
        """One supervised step on (prompt ids, answer ids): the mean cross-entropy of answer tokens.

        It does not count as a version.
        """
        rows = [row_of_tokens([*prompt, *answer], len(prompt)) for prompt, answer in samples]
        batches = pack(rows, self._budget)
        tokens, _ = sum_over_ranks(_sizes(batches))
        losses: list[float] = []

        def loss(batch: MicroBatch) -> torch.Tensor:
            logits = target_logits(self._parallel, batch)
            total = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / tokens
            losses.append(total.item())
            return total

        self._accumulate(batches, loss)
        norm = self._update(lr)
        return {"loss": sum(losses), "grad_norm": norm, "lr": lr, "tokens": tokens}

    def export(self) -> dict[str, torch.Tensor]:
        """The current weights under Hugging Face names: fp32 copies on the CPU, in a fixed order."""
        return export_hf(self._model, self._shape)

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder that transformers loads, with the source's config and tokenizer."""
        save_hf(self.export(), self._shape, folder, self._folder)

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probability of tokens 1.. of each sequence, float32 [T - 1] each."""
        return score(self._model, sequences, self._budget, temperature)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_id: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Sampled answers (greedy at temperature 0) without `eos_id`; meant for short ones."""
        return generate(self._model, prompts, max_new_tokens, eos_id, self._budget, temperature, seed)

    def snapshot(self) -> Snapshot:
        """A copy of weights, optimizer state and version."""
        inner = self._optimizer.optimizer.state_dict()["state"]
        moments = {
            key: {name: value.clone() for name, value in state.items()} for key, state in inner.items()
        }
        weights = [parameter.detach().clone() for parameter in self._model.parameters()]
        return Snapshot(weights, moments, self.version)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`, which stays usable."""
        with torch.no_grad():
            for parameter, weights in zip(self._model.parameters(), snapshot.weights, strict=True):
                parameter.copy_(weights)
        inner = self._optimizer.optimizer
        moments = {
            key: {name: value.clone() for name, value in state.items()}
            for key, state in snapshot.optimizer.items()
        }
        inner.load_state_dict({"state": moments, "param_groups": inner.state_dict()["param_groups"]})
        self.version = snapshot.version

    def _advantages(self, groups: Sequence[Group], step: int) -> list[np.ndarray]:
        """Advantages [G] of each group; permuted over the whole batch in the control run."""
        rewards = [np.array([sample.reward for sample in group.samples]) for group in groups]
        values = advantages(self._objective.advantage, rewards)
        if self._objective.control == "none":
            return values
        shuffled = np.random.default_rng([self._seed, step]).permutation(np.concatenate(values))
        return np.split(shuffled, np.cumsum([len(part) for part in values])[:-1])

    def _loss(self, batch: MicroBatch, totals: Totals, record: TokenRecord) -> torch.Tensor:
        logits = target_logits(self._parallel, batch)
        logprobs, entropy = token_logprobs(logits, batch.targets, batch.temperature)
        result = objective(
            logprobs,
            logprobs.detach(),
            batch.behaviour,
            batch.advantages,
            batch.sample,
            totals,
            self._objective,
        )
        record.add(batch, logprobs, entropy, result)
        return result.loss

    def _accumulate(self, batches: Sequence[MicroBatch], loss: Callable[[MicroBatch], torch.Tensor]) -> None:
        """Sum the gradients of `loss` over the micro-batches, and then over the ranks."""
        # Both: after an update each parameter's grad is its slice of the buffer, and a backward that
        # found it there would count the first micro-batch twice.
        self._optimizer.zero_grad()
        self._parallel.zero_grad_buffer()
        for batch in batches:
            loss(batch).backward()
        self._parallel.finish_grad_sync()

    def _update(self, lr: float) -> float:
        """Clip and step; the gradient norm before clipping. A non-finite one changes nothing."""
        norm = clip_gradients(self._parallel, self._schedule.clip_grad)
        if math.isfinite(norm):
            update(self._optimizer, lr)
        return norm


def _group_metrics(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Means over groups and samples: rewards, answer lengths and staleness by the oldest token."""
    rewards = [np.array([sample.reward for sample in group.samples]) for group in groups]
    staleness = np.array([step - group.version_min for group in groups])
    samples = [sample for group in groups for sample in group.samples]
    return {
        "reward_mean": float(np.concatenate(rewards).mean()),
        "reward_constant": float(np.mean([part.max() == part.min() for part in rewards])),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
        "answer_length_mean": float(np.mean([sample.answer_length for sample in samples])),
        "truncated": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "groups": float(len(groups)),
        "samples": float(len(samples)),
    }


def _sizes(batches: Sequence[MicroBatch]) -> list[float]:
    """Trained tokens and samples of this rank, as `Totals` takes them."""
    return [
        float(sum(len(batch.targets) for batch in batches)),
        float(sum(len(batch.rows) for batch in batches)),
    ]
