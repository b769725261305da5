"""The learner's configuration: what a user may set, with the illegal combinations refused."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from learner.errors import ConfigError

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class ModelConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Which model is trained and how its sequences are packed."""

    path: str
    """Hugging Face checkpoint folder: config.json, safetensors and tokenizer files."""
    micro_batch_tokens: Count = 2048
    """Tokens in one forward pass. A longer sequence gets a micro-batch of its own."""


class SourceConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """One of several data sets that a run mixes."""

    path: str
    """JSONL file."""
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

    path: str
    """JSONL file; empty where `sources` are given."""
    sources: list[SourceConfig] = []
    """Several JSONL files with weights, instead of `path`."""
    question: str = "question"
    """Field of the question in `path`, `held_out` and `demonstrations`: a text, or a list of messages
    with `role` and `content` for the chat template."""
    answer: str = "answer"
    """Field of the gold answer there, a text, in the form that the reward function reads."""
    answer_marker: str = "####"
    """What every gold answer must hold, so that data which the reward cannot read is refused at the
    start; empty: anything."""
    held_out: str = ""
    """JSONL file of questions that are only measured on; empty: the training questions."""
    demonstrations: str = ""
    """JSONL file of answers that the supervised warm-up learns; empty: those of the training questions."""
    template: str = ""
    """Prompt text with `{question}` in it; empty: the tokenizer's chat template, or the question and a
    line break if it has none."""
    system: str = ""
    """System message before the question in the chat template; empty: none."""
    min_prompt_tokens: Count = 1
    """Shorter prompts are left out."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out; how many prompts are left out is said at the start."""
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


class ObjectiveConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The policy-gradient objective. Symbols: mu wrote the tokens, pi_p starts the step, pi is trained."""

    mode: Literal["decoupled", "bypass"] = "decoupled"
    """`decoupled`: ratio pi / pi_p, weighted by the correction of pi_p / mu. `bypass`: ratio pi / mu."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] = "grpo"
    """How rewards become advantages, see `learner.advantage`."""
    correction: Literal["none", "tis", "icepop", "mis", "geo"] = "tis"
    """What is done about mu differing from pi_p, see `learner.objective.correction_weights`."""
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
    loss: Literal["ppo_clip"] = "ppo_clip"
    """The surrogate."""
    clip_low: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2
    """The ratio is clipped below 1 - clip_low. Only `bypass` can clip: see `learner.objective`."""
    clip_high: Positive = 0.2
    """The ratio is clipped above 1 + clip_high. Only `bypass` can clip."""
    dual_clip: Annotated[float, msgspec.Meta(gt=1)] = 3.0
    """Cap of the ratio where the advantage is negative (dual-clip PPO, arXiv 1912.09729)."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over the batch's trained tokens, or over its samples of their token means."""
    control: Literal["none", "shuffle_advantages"] = "none"
    """`shuffle_advantages` permutes them within the batch: a run that must not learn."""

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning, with the reason."""
        if self.mode == "bypass" and self.correction == "tis":
            raise ConfigError(
                "objective.correction: got `tis` with mode `bypass`, whose ratio already is pi / mu, so the "
                "weight would count twice; use `none`, `icepop`, `mis` or `geo`, or mode `decoupled`"
            )
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
