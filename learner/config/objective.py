"""What is optimized, with the combinations that mean nothing refused."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from learner.config.bounds import Count, NonNegative, Positive
from learner.config.legal import ADVANTAGES, LOSSES, refusal
from learner.errors import ConfigError


class KlConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True, rename={"where": "in"}):
    """A penalty on the distance to a reference model, which is kept as a second copy in CPU memory."""

    coefficient: NonNegative = 0.0
    """What a nat of divergence costs, in reward (`in = "reward"`) or in loss. 0: no reference model."""
    where: Literal["reward", "loss"] = "reward"
    """Written `in`. `reward` subtracts an answer's log pi_p - log ref from its reward; `loss` adds the
    estimator of every token, times the stop-gradient correction."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """With d = log pi - log ref: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d. `reward` takes k1 alone."""
    reference: str = ""
    """Checkpoint folder of the reference model; empty: the weights that step 0 starts from."""

    def __post_init__(self) -> None:
        """Refuse estimators whose gradient is not that of a divergence."""
        if self.where == "loss" and self.estimator == "k1":
            raise ConfigError(
                "objective.kl.estimator: got `k1` with in = `loss`, whose expected gradient is 0: the mean "
                "of grad log pi; use `k2` or `k3`, or in = `reward`"
            )
        if self.where == "reward" and self.estimator != "k1":
            raise ConfigError(
                f"objective.kl.estimator: got `{self.estimator}` with in = `reward`, where only `k1` gives "
                "the gradient of KL(pi || ref); use `k1`, or in = `loss`"
            )


class AbortConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """When a run that only burns samples ends by itself."""

    masked: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """Share of tokens to which the correction gives weight 0, above which a step counts; 1: never."""
    staleness: NonNegative = 0.0
    """Mean staleness of a token, in steps, above which a step counts; 0: never, `stream.max_staleness`
    alone is the bound."""
    steps: Count = 20
    """So many steps in a row that count end the run, with what to do."""
    mismatch: NonNegative = 0.1
    """Mean |log p(engine) - log p(learner)| of the first batch's tokens, in nats, above which the run ends
    before it trains them; 0: never. In fp32 it is below 1e-5, in bf16 some 0.01; a stale prefix cache
    was seen to give 0.9."""


class ObjectiveConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The policy-gradient objective. Symbols: mu wrote the tokens, pi_p starts the step, pi is trained.

    Which combinations mean something: `learner.config.legal`.
    """

    mode: Literal["decoupled", "bypass"] = "decoupled"
    """`decoupled`: ratio pi / pi_p, weighted by the correction of pi_p / mu. `bypass`: ratio pi / mu."""
    mini_batches: Count = 1
    """Optimizer steps a batch, each on its own share of the groups. 1 needs no forward pass for pi_p."""
    advantage: str = "grpo"
    """How rewards become advantages: `grpo`, `dr_grpo`, `rloo`, `reinforce_pp`, or a function of your own as
    `module:function`, see `learner.advantage`."""
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    """Answers cut off at the token limit: trained like any other, treated as if they had not been
    sampled, or (like all long ones) trained with a lower reward, see `learner.samples`."""
    overlong_length: Annotated[int, msgspec.Meta(ge=0)] = 0
    """`penalty`: answer tokens at which the penalty is complete, as `rollout.sampling.max_new_tokens`."""
    overlong_ramp: Annotated[int, msgspec.Meta(ge=0)] = 0
    """`penalty`: answer tokens over which it grows from 0, before `overlong_length`."""
    overlong_factor: Positive = 1.0
    """`penalty`: what the complete penalty takes from the reward."""
    correction: Literal["none", "tis", "icepop", "mis", "geo", "vtrace"] = "tis"
    """What is done about mu differing from pi_p, see `learner.objective.corrections`."""
    level: Literal["token", "sequence"] = "token"
    """Whether `tis` truncates each token's ratio or that of the whole answer."""
    cap: Positive = 2.0
    """Largest importance weight of `tis`, `mis` and `geo`."""
    icepop_low: NonNegative = 0.5
    """`icepop` drops tokens whose ratio is below this."""
    icepop_high: Positive = 5.0
    """`icepop` drops tokens whose ratio is above this."""
    mis_low: NonNegative = 0.5
    """`mis` drops answers whose product of ratios is below this."""
    mis_high: Positive = 2.0
    """`mis` drops answers whose product of ratios is above this."""
    geo_low: NonNegative = 0.99
    """`geo` drops answers whose geometric mean ratio is below this."""
    geo_high: Positive = 1.01
    """`geo` drops answers whose geometric mean ratio is above this."""
    loss: str = "ppo_clip"
    """The surrogate: `ppo_clip`, `gspo`, `cispo`, `topr`, or a function of your own as
    `module:function`, see `learner.objective.losses`."""
    clip_low: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2
    """`ppo_clip` clips the ratio below 1 - clip_low. Acts in `bypass` or with several mini-batches."""
    clip_high: Positive = 0.2
    """`ppo_clip` clips the ratio above 1 + clip_high; more than clip_low is clip-higher."""
    dual_clip: Annotated[float, msgspec.Meta(gt=1)] = 3.0
    """`ppo_clip` caps the ratio here where the advantage is negative (dual-clip PPO, arXiv 1912.09729)."""
    gspo_low: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 3e-4
    """`gspo` clips an answer's geometric mean ratio below 1 - gspo_low."""
    gspo_high: Positive = 4e-4
    """`gspo` clips an answer's geometric mean ratio above 1 + gspo_high."""
    cispo_cap: Positive = 5.0
    """`cispo` truncates the ratio's stop-gradient weight here."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """Mean over the batch's trained tokens, over its samples of their token means, or over its samples
    of their token sums divided by `sequence_constant`."""
    sequence_constant: Annotated[int, msgspec.Meta(ge=0)] = 0
    """`sequence_sum`: tokens to divide by, the same for every answer (Dr. GRPO, arXiv 2503.20783)."""
    entropy: NonNegative = 0.0
    """Coefficient of the entropy bonus, loss a nat."""
    routing_replay: bool = False
    """Train mixtures of experts with the experts that the engine sent each token to (rollout routing replay,
    R3, arXiv 2510.11370): engines return them, groups carry them, routers replay them, also where a
    backward pass computes again."""
    kl: KlConfig = KlConfig()
    """What keeps the policy near a reference model."""
    abort: AbortConfig = AbortConfig()
    """When the run ends because it learns nothing."""
    control: Literal["none", "shuffle_advantages"] = "none"
    """`shuffle_advantages` permutes them within the batch: a run that must not learn."""

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning, with the reason."""
        self._check_names()
        if reason := refusal(self.loss, self.mode, self.correction, self.mini_batches):
            raise ConfigError(reason)
        if self.level == "sequence" and self.correction != "tis":
            raise ConfigError(
                f"objective.level: got `sequence` with correction `{self.correction}`, whose level is "
                "fixed; only `tis` has both"
            )
        for name in ("icepop", "mis", "geo"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if not low < 1 < high:
                raise ConfigError(
                    f"objective.{name}_low / {name}_high: got {low} / {high}, expected low < 1 < high"
                )
        if self.aggregation == "sequence_sum" and not self.sequence_constant:
            raise ConfigError(
                "objective.sequence_constant: got 0 with aggregation `sequence_sum`, expected the tokens to "
                "divide by; set it to rollout.sampling.max_new_tokens"
            )
        if self.overlong == "penalty" and not 0 < self.overlong_ramp <= self.overlong_length:
            raise ConfigError(
                f"objective.overlong_length / overlong_ramp: got {self.overlong_length} / "
                f"{self.overlong_ramp} with overlong `penalty`, expected 0 < ramp <= length; set the length "
                "to rollout.sampling.max_new_tokens and the ramp to a fifth of it"
            )

    def _check_names(self) -> None:
        for field, known in (("loss", LOSSES), ("advantage", ADVANTAGES)):
            name = getattr(self, field)
            module, _, function = name.partition(":")
            if name not in known and not (module and function):
                raise ConfigError(
                    f"objective.{field}: got `{name}`, expected {', '.join(f'`{one}`' for one in known)} or "
                    "a function of your own as `module:function`"
                )
        if self.loss == "gspo" and self.aggregation != "sequence_mean":
            raise ConfigError(
                f"objective.aggregation: got `{self.aggregation}` with loss `gspo`, which has one "
                "ratio an answer and is defined as a mean over answers; use `sequence_mean`"
            )
