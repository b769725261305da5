"""One optimizer step: groups in, a new policy version and its metrics out.

Worked example::

    trainer = Trainer(Path("model"), ModelConfig(path="model"), OptimizerConfig(), ObjectiveConfig())
    trainer.version                         # 0
    metrics = trainer.train_step(groups, step=0)
    trainer.version                         # 1
    trainer.export()                        # weights of version 1 under Hugging Face names
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from buffer.schema import Group
from learner.advantage import advantages, formula_named
from learner.checkpoint.state import Part, load, parts
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.config.legal import idle_settings
from learner.convert.hf import export_hf, load_hf, save_hf
from learner.diagnostics import Stopwatch, Tally, count_groups, count_tokens, summary
from learner.errors import BatchError, CheckpointError, ConfigError
from learner.flops import cost_of
from learner.metrics import Metrics
from learner.mfu import Utilisation
from learner.minibatch import MiniBatch, Packed, less_divergence, scored, with_advantages
from learner.model.build import build_model, data_parallel
from learner.model.forward import generate, of_logprobs, score, target_logprobs
from learner.model.hf_config import read_shape
from learner.model.optimizer import (
    build_optimizer,
    clipped_update,
    learning_rate,
    set_updates,
    torch_optimizers,
    updates_made,
)
from learner.model.routing import replay_routing
from learner.model.schedule import forward_backward, forward_only
from learner.model.world import (
    count_ranks,
    from_last_stage,
    max_over_ranks,
    merge_over_ranks,
    rank,
    sizes,
    sum_over_ranks,
)
from learner.objective import Tokens, Totals, objective
from learner.objective.losses import loss_named
from learner.packing import MicroBatch, Row, pack, row_of_tokens
from learner.prepare import Preparation
from learner.reference import Reference
from learner.watch import Watch

log = logging.getLogger("learner.step")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of everything a step changes, to go back to."""

    weights: list[torch.Tensor]
    """Copies of the parameters, in the model's order."""
    exact: list[torch.Tensor]
    """Copies of the optimizer's own fp32 weights, where the model's are rounded from them."""
    optimizer: list[dict[str, Any]]
    """A copy of each optimizer's moments, by parameter number."""
    updates: int
    """Updates behind the moments."""
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

        `seed` only drives the control run's permutation. Settings without effect are warned of. Raises
        `ModelError` for a checkpoint that cannot be trained exactly, `ConfigError` for a loss that cannot
        be imported, or a model that the ranks of this world cannot share as `model.parallel` says.
        """
        for sentence in idle_settings(objective):
            warnings.warn(sentence, stacklevel=2)
        loss_named(objective.loss), formula_named(objective.advantage)
        self.version = 0
        """v: optimizer steps taken, skipped ones included; the weights are those of version v."""
        self.before_update: Callable[[], None] = lambda: None
        """Called before weights and moments change: somebody may still copy them."""
        self._folder = folder
        self._chunk = model.logits_chunk
        self._schedule = optimizer
        self._objective = objective
        self._watch = Watch(objective)
        self._seed = seed
        self._shape = read_shape(folder)
        self._model = build_model(self._shape, getattr(torch, model.dtype), model.recompute)
        if objective.routing_replay:
            replay_routing(self._model, self._shape)
        parallel = sizes()
        if model.parallel != parallel:
            raise ConfigError(
                f"model.parallel: got {model.parallel}, but the world was joined with {parallel}; give "
                "`join_world` the same"
            )
        self._fit = partial(
            pack,
            budget=model.micro_batch_tokens,
            context=parallel.context,
            tensor=parallel.tensor,
        )
        self._alone = parallel_state.get_data_parallel_world_size() == 1
        self._cost = None if self._alone and parallel.pipeline == 1 else cost_of(self._shape)
        self._utilisation = Utilisation.of(model, self._shape)
        self._preparation = Preparation(objective, self._shape, self._pack, alone=self._alone)
        self._reference: Reference | None = None
        if objective.kl.coefficient and objective.kl.reference:
            load_hf(self._model, self._shape, Path(objective.kl.reference))
            self._reference = Reference(self._model)
        load_hf(self._model, self._shape, folder)
        self._parallel = data_parallel(self._model)
        self._device = next(self._model.parameters()).device
        self._optimizer = build_optimizer(self._parallel, optimizer)

    def prepare(self, groups: Sequence[Group], step: int) -> None:
        """Make ready, in any thread, what `train_step` of the same groups needs. Raises `BatchError`."""
        self._preparation.ahead(groups, step)

    def train_step(self, groups: Sequence[Group], step: int) -> Metrics:
        """Train version `step` on `groups` and return its metrics; the version is `step` + 1 afterwards.

        Groups are taken in the order of their ids, so arrival order cannot matter; those of fewer than 2
        valid samples are left out and logged. A gradient whose norm is not finite changes no weight and
        is reported as `skipped`, as is a batch without a trained token. The ranks that share one copy of the
        model are given the same groups; all ranks return the same figures, but for seconds.
        Raises `BatchError` for a step other than the current version or no groups on any rank, `Aborted`
        when a threshold ended the run.
        """
        if step != self.version:
            raise BatchError(f"step {step}: the weights are version {self.version}; train that step first")
        if not sum_over_ranks([float(len(groups))])[0]:
            raise BatchError(f"step {step}: got 0 groups, expected at least 1; wait for a batch")
        self._watch.check()
        watch, tally = Stopwatch(), Tally()
        minis = self._mini_batches(sorted(groups, key=lambda group: group.id), step, watch, tally)
        lr = learning_rate(self._schedule, step)
        norms = [self._train(mini, step, lr, watch, tally) for mini in minis]
        tally.add("flops", sum(self._utilisation.flops(part.batch) for mini in minis for part in mini.packed))
        self.version += 1
        done = [norm for norm in norms if norm is not None]
        total = tally.merged(merge_over_ranks, max_over_ranks)
        total.sums, total.maxima = from_last_stage([total.sums, total.maxima], list[dict[str, float]])
        metrics = {
            **summary(total, self._objective.correction == "vtrace"),
            "loss": total["loss"] / max(1, len(done)),
            "lr": lr,
            "grad_norm": max(done, key=lambda norm: (not math.isfinite(norm), norm), default=None),
            "skipped": float(len(norms) - sum(map(math.isfinite, done))),
            "micro_batches": float(sum(len(mini.packed) for mini in minis)),
            **(seconds := watch.seconds()),
            **self._utilisation.figures(total["flops"], seconds["seconds"]),
        }
        self._watch.see(step, metrics)
        return metrics

    def sft_step(self, samples: Sequence[tuple[list[int], list[int]]], lr: float) -> dict[str, float]:
        """One supervised step on (prompt ids, answer ids): the mean cross-entropy of answer tokens.

        It does not count as a version.
        """
        rows = [row_of_tokens([*prompt, *answer], len(prompt)) for prompt, answer in samples]
        packed = [Packed(batch) for batch in self._pack(rows)]
        (tokens,) = sum_over_ranks([float(sum(len(part.batch.targets) for part in packed))])
        losses: list[float] = []

        def loss(_: Packed, output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            total = -output[0].sum() / tokens
            losses.append(total.item())
            return total

        self._accumulate(packed, loss, Stopwatch())
        norm = self._update(lr)
        (total,) = from_last_stage(sum_over_ranks([sum(losses)]), list[float])
        return {"loss": total, "grad_norm": norm, "lr": lr, "tokens": tokens}

    def export(self) -> dict[str, torch.Tensor]:
        """The current weights under Hugging Face names, in a fixed order: copies on the CPU.

        They have the model's dtypes. A collective: rank 0 gets all of them, the others none.
        """
        return export_hf(self._model, self._shape)

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder that transformers loads, with the source's config and tokenizer.

        Rank 0 writes what all ranks `export`.
        """
        tensors = self.export()
        if rank() == 0:
            save_hf(tensors, self._shape, folder, self._folder)

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probability of tokens 1.. of each sequence, float32 [T - 1] each; the same on all ranks."""
        return score(self._model, sequences, self._fit, temperature, self._chunk)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_id: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Sampled answers (greedy at temperature 0) without `eos_id`; meant for short ones."""
        return generate(self._model, prompts, max_new_tokens, eos_id, self._fit, temperature, seed)

    def parts(self) -> list[Part]:
        """What a checkpoint holds: views of weights and moments, which the next step changes."""
        return parts(self._model, self._optimizer)

    def optimizer_steps(self) -> int:
        """Updates behind the optimizer's moments; steps that were skipped made none."""
        return updates_made(self._optimizer)

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from a checkpoint of the run that this trainer, so far untrained, started.

        The reference model, unless it has a checkpoint of its own, is the policy of now. Raises
        `CheckpointError`, on every rank if on any.
        """
        if self._objective.kl.coefficient:
            self._reference_at(0)
        error = None
        try:
            self.version = load(self._model, self._optimizer, folder, rank())
        except CheckpointError as found:
            error = found
        if failed := count_ranks(error is not None):
            raise error or CheckpointError(f"{folder} cannot be read by {failed} other ranks")

    def snapshot(self) -> Snapshot:
        """A copy of weights, optimizer state and version."""
        moments = [_copy(inner.state_dict()["state"]) for inner in torch_optimizers(self._optimizer)]
        weights = [parameter.detach().clone() for parameter in self._model.parameters()]
        exact = [copy.clone() for copy in self._exact()]
        return Snapshot(weights, exact, moments, self.optimizer_steps(), self.version)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`, which stays usable."""
        with torch.no_grad():
            for parameter, weights in zip(self._model.parameters(), snapshot.weights, strict=True):
                parameter.copy_(weights)
            for own, weights in zip(self._exact(), snapshot.exact, strict=True):
                own.copy_(weights)
        for inner, moments in zip(torch_optimizers(self._optimizer), snapshot.optimizer, strict=True):
            inner.load_state_dict(
                {"state": _copy(moments), "param_groups": inner.state_dict()["param_groups"]}
            )
        set_updates(self._optimizer, snapshot.updates)
        self.version = snapshot.version

    def _exact(self) -> list[torch.Tensor]:
        """The weights that the optimizer keeps beside the model's."""
        models = {id(parameter) for parameter in self._model.parameters()}
        own = (value for group in self._optimizer.param_groups for value in group["params"])
        return [value.detach() for value in own if id(value) not in models]

    def _mini_batches(
        self, groups: list[Group], step: int, watch: Stopwatch, tally: Tally
    ) -> list[MiniBatch]:
        """What the step trains, ready to be trained; counts the groups."""
        config, kl = self._objective, self._objective.kl
        with watch("pack"):
            chosen, minis = self._preparation.mini_batches(groups, step)
        priced = kl.coefficient > 0 and kl.where == "reward"
        with watch("score"):
            if config.mini_batches > 1 or priced:
                minis = scored(minis, self._score, "proximal")
            if kl.coefficient:
                with self._reference_at(step).in_place(self._model):
                    minis = scored(minis, self._score, "reference")
        with watch("pack"):
            if priced:
                minis = less_divergence(minis, config)
            shaped = [group for mini in minis for group in mini.groups]
            values = self._advantages(shaped, step)
            count_groups(tally, groups, chosen, shaped, values, step)
            return with_advantages(minis, values)

    def _reference_at(self, step: int) -> Reference:
        """The reference model, which without a checkpoint of its own is the policy of step 0."""
        if self._reference is None:
            if step:
                raise ConfigError(
                    f"objective.kl.reference: got none in a run that goes on at step {step}; name the "
                    "checkpoint that step 0 started from"
                )
            self._reference = Reference(self._model)
        return self._reference

    def _advantages(self, groups: Sequence[Group], step: int) -> list[np.ndarray]:
        """Advantages [G] of each group; permuted over the whole batch in the control run."""
        rewards = [np.array([sample.reward for sample in group.samples]) for group in groups]
        values = advantages(self._objective.advantage, rewards, sum_over_ranks)
        if self._objective.control == "none" or not values:
            return values
        shuffled = np.random.default_rng([self._seed, step]).permutation(np.concatenate(values))
        return np.split(shuffled, np.cumsum([len(part) for part in values])[:-1])

    def _score(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        forward = partial(target_logprobs, self._parallel, chunk=self._chunk)
        return forward_only(self._parallel, batches, forward, of_logprobs)

    def _train(self, mini: MiniBatch, step: int, lr: float, watch: Stopwatch, tally: Tally) -> float | None:
        """One optimizer step; the gradient norm before clipping, None if there was nothing to train."""
        if not mini.totals.tokens:
            log.warning("step %d: no token to train; the update is skipped", step)
            return None
        self._accumulate(mini.packed, partial(self._loss, mini.totals, tally), watch)
        self.before_update()
        with watch("update"):
            norm = self._update(lr)
        if not math.isfinite(norm):
            names = ", ".join(group.id for group in mini.groups)
            log.warning("step %d: gradient norm %s; the update is skipped; groups %s", step, norm, names)
        return norm

    def _loss(
        self, totals: Totals, tally: Tally, packed: Packed, output: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """A micro-batch's share of the loss, from log-probability and entropy [N] of its targets."""
        packed, config, (logprobs, entropy) = packed.to(self._device), self._objective, output
        batch = packed.batch
        if not batch.rows:  # only the other ranks' collectives want this pass
            return logprobs.sum()
        proximal = (
            logprobs.detach() if packed.proximal is None or config.mini_batches == 1 else packed.proximal
        )
        tokens = Tokens(
            logprobs, proximal, batch.behaviour, batch.advantages, batch.sample, packed.reference, entropy
        )
        result = objective(tokens, totals, config)
        count_tokens(tally, tokens, result, entropy, batch.staleness)
        return result.loss

    def _pack(self, rows: Sequence[Row]) -> list[MicroBatch]:
        """Micro-batches of this rank's rows, as many as on every data-parallel rank."""
        batches = self._fit(rows)
        if self._cost is None:
            return batches
        count = len(batches) if self._alone else int(max_over_ranks([float(len(batches))])[0])
        return self._fit(rows, count=count, cost=self._cost)

    def _accumulate(
        self, packed: Sequence[Packed], loss: Callable[..., torch.Tensor], watch: Stopwatch
    ) -> None:
        """Sum the gradients of the micro-batches' losses, `loss(packed, output)`, and then over the ranks."""
        # Both: after an update each parameter's grad is its slice of the buffer, and a backward that
        # found it there would count the first micro-batch twice.
        self._optimizer.zero_grad()
        self._parallel.zero_grad_buffer()

        def forward(part: Packed) -> Any:
            bonus = self._objective.entropy > 0
            return target_logprobs(self._parallel, part.batch, self._chunk, entropy_gradient=bonus)

        forward_backward(self._parallel, packed, forward, loss, watch)

    def _update(self, lr: float) -> float:
        """Clip and step; the gradient norm before clipping. A non-finite one changes nothing."""
        return clipped_update(self._parallel, self._optimizer, lr, self._schedule.clip_grad)


def _copy(state: dict[Any, dict[str, torch.Tensor]]) -> dict[Any, dict[str, torch.Tensor]]:
    """An optimizer's moments and counters, copied."""
    return {key: {name: value.clone() for name, value in part.items()} for key, part in state.items()}
