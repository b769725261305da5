"""The learner's configuration: what a user may set, with the illegal combinations refused."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from learner.errors import ConfigError
from learner.legal import ADVANTAGES, LOSSES, refusal

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class ParallelConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How the ranks of a learner share one model. What is left of them is data parallelism:
    ranks / (tensor * pipeline * context) copies, each of which trains its own groups."""

    tensor: Count = 1
    """Ranks that share every matrix by rows or columns; heads, groups and the vocabulary divide by it. With
    more than 1, activations between the matrices are split by tokens (sequence parallelism)."""
    pipeline: Count = 1
    """Stages of layers, scheduled one forward, one backward; the layers divide by it."""
    context: Count = 1
    """Ranks that share every sequence; each holds 2 of its 2 * context pieces."""
    expert: Count = 1
    """Ranks over which the experts of a layer are dealt; divides their number. It takes ranks of data,
    context and tensor parallelism, not further ones."""
    expert_tensor: Count = 1
    """Ranks that share each expert's matrices, whatever `tensor` is for all others."""
    virtual_pipeline: Count = 1
    """Separate runs of layers on each stage (the interleaved schedule); only 1 can be had."""

    def __post_init__(self) -> None:
        """Refuse the schedule that gives wrong results."""
        if self.virtual_pipeline > 1:
            raise ConfigError(
                f"model.parallel.virtual_pipeline: got {self.virtual_pipeline}, expected 1: Megatron-Core's "
                "interleaved schedule took another micro-batch's length when lengths differed, and packed "
                "micro-batches always differ; use `pipeline` alone"
            )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tensor * self.pipeline * self.context


Recompute = Literal["none", "selective", "full"]
"""What a backward pass computes again, see `ModelConfig.recompute`."""


class ModelConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Which model is trained and how its sequences are packed."""

    path: str
    """Hugging Face checkpoint folder: config.json, safetensors and tokenizer files."""
    micro_batch_tokens: Count = 2048
    """Tokens in one forward pass. A longer sequence gets a micro-batch of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations; the optimizer's copy, routers and decays are fp32 in any case."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it: `selective` the inside of attention, MLPs
    and experts, `full` whole layers, of which then only the inputs are kept. Same gradients, less memory,
    more time."""
    parallel: ParallelConfig = ParallelConfig()
    logits_chunk: Count = 1024
    """Targets whose logits are in memory at once, in fp32 over the vocabulary: the output layer runs over
    so many at a time, and again in the backward pass."""

    peak_tflops: NonNegative = 0.0
    """Dense TFLOP/s of one GPU in `dtype`, for the figure `mfu`; 0: in bf16 by the card's name, if it is
    known (`learner.mfu`)."""

    def alone(self) -> ModelConfig:
        """The same model on one rank."""
        return msgspec.structs.replace(self, parallel=ParallelConfig())


class SourceConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """One of several data sets that a run mixes."""

    path: str
    """File, saved folder or pattern, as `data.path`."""
    weight: Positive = 1.0
    """How often an epoch asks each of its rows: 2 is twice, 0.5 is half of them, the other half the
    epoch after."""
    question: str = "question"
    """Field of the question."""
    answer: str = "answer"
    """Field of the gold answer."""
    template: str = ""
    """Prompt text for its questions; empty: that of `data.template`."""


class DataConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Which questions a run asks."""

    path: str = ""
    """JSONL or Parquet file, folder saved by Hugging Face `datasets`, or pattern such as
    `data/train-*.parquet`; absent where `sources` are given."""
    sources: list[SourceConfig] = []
    """Several data sets with weights, instead of `path`."""
    question: str = "question"
    """Field of the question in `path`, `held_out` and `demonstrations`: a text, or a list of messages
    with `role` and `content` for the chat template."""
    answer: str = "answer"
    """Field of the gold answer there, a text, in the form that the reward function reads."""
    answer_marker: str = "####"
    """What every gold answer must hold, so that data which the reward cannot read is refused at the
    start; empty: anything."""
    held_out: str = ""
    """Questions that are only measured on, as `path`; empty: the training questions."""
    demonstrations: str = ""
    """Answers that the supervised warm-up learns, as `path`; empty: those of the training questions."""
    template: str = ""
    """Prompt text with `{question}` in it; empty: the tokenizer's chat template, or the question and a
    line break if it has none."""
    system: str = ""
    """System message before the question in the chat template; empty: none."""
    min_prompt_tokens: Count = 1
    """Shorter prompts are left out."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out; how many prompts are left out is said at the start."""
    skip_solved: Annotated[int, msgspec.Meta(ge=0)] = 0
    """A question that so many groups solved (`rollout.solved`) is left out of later epochs; 0: never."""
    skip_failed: Annotated[int, msgspec.Meta(ge=0)] = 0
    """A question at which so many groups failed (`rollout.failed`) is left out of later epochs; 0: never."""
    epochs: Count | None = None
    """Passes through the data after which the run ends; absent: it ends at `stream.max_steps` alone."""

    def __post_init__(self) -> None:
        """Refuse what would have no effect, or no prompt could meet."""
        if self.path and self.sources:
            raise ConfigError("data.sources: got some with data.path set as well; give one of the two")
        if self.system and self.template:
            raise ConfigError(
                "data.system: got one with data.template, which is all of the prompt; put it there instead"
            )
        if self.min_prompt_tokens > self.max_prompt_tokens:
            raise ConfigError(
                f"data.min_prompt_tokens: got {self.min_prompt_tokens}, expected at most max_prompt_tokens "
                f"({self.max_prompt_tokens})"
            )


class OptimizerConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """AdamW and its learning-rate schedule."""

    lr: NonNegative = 3e-4
    """Peak learning rate. 0 leaves every weight bitwise unchanged."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment, each in [0, 1)."""
    eps: Positive = 1e-8
    """Adam's denominator offset."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; norms are never decayed."""
    clip_grad: NonNegative = 0.5
    """Largest global gradient norm; 0 never clips."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up; `linear` and `cosine` end at 0."""
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 20
    """Steps over which the learning rate rises linearly to `lr`."""
    decay_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Step at which `linear` and `cosine` reach 0; unused, hence 0, with `constant`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be scheduled."""
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas: got {self.betas}, expected two numbers in [0, 1)")
        if self.schedule == "constant" and self.decay_steps:
            raise ConfigError(
                f"optimizer.decay_steps: got {self.decay_steps} with schedule `constant`, which never "
                "decays; choose `linear` or `cosine`, or leave decay_steps out"
            )
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer.decay_steps: got {self.decay_steps}, expected more than warmup_steps "
                f"({self.warmup_steps}) with schedule `{self.schedule}`"
            )


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

    Which combinations mean something: `learner.legal`.
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
    abort: AbortConfig = AbortConfig()
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


class CheckpointConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What a run that is cut off goes on from, see docs/checkpoints.md."""

    every: Annotated[int, msgspec.Meta(ge=0)] = 10
    """Steps between checkpoints. Redis keeps the payloads of all steps since the oldest of `keep_last`, so
    more steps cost memory there, fewer cost disk. 0: none; a run that is cut off is then over."""
    keep_last: Count = 2
    """Checkpoints to go on from; 2, so that one whose disk fails is not the only one."""
    keep_every: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Checkpoints of versions that are multiples of this are never removed; going back to one that is not
    among `keep_last` takes a new lineage. 0: none."""

    def __post_init__(self) -> None:
        """Refuse an archive that would stay empty."""
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ConfigError(
                f"checkpoint.keep_every: got {self.keep_every} with every = {self.every}, expected a "
                "multiple of it: only checkpoints that are written can be kept"
            )


class WeightsConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Which exported versions stay on disk, see docs/evaluation.md."""

    keep: Annotated[int, msgspec.Meta(ge=0)] | Literal["all"] | None = None
    """How many of the newest versions; absent: `stream.max_staleness` + 2. Version 0 and the newest one that
    an evaluation is to have stay besides."""


class SftConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A supervised warm-up that ends at an accuracy."""

    demonstrate: Literal["solution", "final"] = "solution"
    """What is learned: the whole solution, or only its last line, `#### <final answer>`."""
    lr: Positive = 1e-3
    """Learning rate after 20 steps of linear rise."""
    batch: Count = 256
    """Demonstrations a step."""
    max_steps: Count = 3000
    """End after this many steps, undone ones included, even below the target."""
    target_accuracy_low: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.42
    """Stop when the accuracy, measured on the questions that the run will ask, reaches this."""
    target_accuracy_high: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.48
    """Above this the last interval is undone and taken again in smaller ones."""
    measure_every: Count = 20
    """Steps between two measurements at first; halved after each overshoot."""
    measure_prompts: Count = 512
    """Prompts of a measurement, sampled at temperature 1; each interval first tries a quarter."""
    max_answer_tokens: Count = 16
    """Token limit of a sampled answer."""

    def __post_init__(self) -> None:
        """Refuse an empty target."""
        if self.target_accuracy_low >= self.target_accuracy_high:
            raise ConfigError(
                f"sft.target_accuracy_low: got {self.target_accuracy_low}, expected less than "
                f"target_accuracy_high ({self.target_accuracy_high})"
            )
