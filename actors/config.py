"""Configuration of the actors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]

IN_PLACE = (
    "answers would go on from caches of the old weights, and no record could say so: their tokens are of "
    "neither version"
)
"""Why one of SGLang's ways to pause is not taken."""

OURS = {
    "config": "SGLang takes one file, which is that of its keys; name the options here one by one",
    "host": "the server listens on loopback, since its key amounts to running code there",
    "port": "the actor chooses a free one",
    "api-key": "the actor makes a new one for each server",
    "admin-api-key": "the actor makes a new one for each server",
    "model-path": "the model is the run's, model.path",
    "load-format": "weights come from the learner",
    "custom-weight-loader": "it is how weights come from the learner",
    "skip-tokenizer-init": "tokens go in and come out as ids",
}
"""Options of SGLang's server that only an actor can say, and why."""
SPECULATION = "speculative-"
"""How SGLang's options of speculative decoding begin."""

NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
"""The values of the sampling filters that leave the model's distribution as it is."""


class EngineConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The SGLang server of one actor."""

    device: Literal["cpu", "cuda"] = "cpu"
    """`cpu` runs SGLang through our platform plug-in, on one thread."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights, activations and key-value cache; `float32` is what equals the learner's exactly."""
    max_running_requests: Count = 128
    """Samples generated at the same time; more wait in the server."""
    max_total_tokens: Count = 16384
    """Tokens in the key-value cache, over all running samples."""
    context_length: Count | None = None
    """Longest prompt and answer together, tokens; absent: what the model's config says."""
    start_timeout_s: Positive = 180.0
    """Seconds from the start of the process to its first answer."""
    request_timeout_s: Positive = 300.0
    """Seconds for the samples of one prompt, waiting in the server included."""
    pause: Literal["abort", "finish", "in_place", "retract"] = "abort"
    """What becomes of samples under way when a new version comes. `abort`: they are ended, keep their
    tokens, and go on under the new one; `finish`: they are finished first; `retract`: the server puts them
    back into its queue and goes on by itself, which takes SGLang 0.5.21. `in_place`, which SGLang has, too,
    is refused, with the reason."""
    update_timeout_s: Positive = 60.0
    """Seconds for a new version, and before that for the samples under way to be ended or finished."""
    server_args: dict[str, str | int | float | bool] = {}
    """More options of SGLang's server by their long names, such as `{"tp-size" = 4}`; `true` gives the
    bare flag. They win over ours, but for those that would cut the engine off from its actor."""

    def __post_init__(self) -> None:
        """Refuse pauses that falsify records, and options that are not the user's to choose. Raises
        `ValueError`; msgspec adds the path.
        """
        if self.pause == "in_place":
            raise ValueError(f"pause: got 'in_place': {IN_PLACE}; set abort, finish or retract")
        for name in self.server_args:
            if why := OURS.get(name):
                raise ValueError(f"server_args: got {name!r}, and {why}; remove it")
            if name.startswith(SPECULATION):
                raise ValueError(
                    f"server_args: got {name!r}, but weights of a draft, multi-token prediction too, are not "
                    "sent to engines; remove it"
                )


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How an engine draws answers."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """0 takes the likeliest token."""
    max_new_tokens: Count = 64
    """Longest answer, tokens; one that reaches it finishes as `length`."""
    stop_token_ids: list[int] = []
    """Tokens that end an answer besides the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on past end-of-sequence tokens; for measuring."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that have this probability together."""
    top_k: int = -1
    """Draw among so many of the likeliest tokens; -1: all."""

    def __post_init__(self) -> None:
        """Refuse a draw from nothing. Raises `ValueError` naming the field; msgspec adds the path."""
        if self.top_k < 1 and self.top_k != -1:
            raise ValueError(f"top_k: got {self.top_k}, expected 1 or more, or -1 for all tokens")


class SamplingConfig(Sampling, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How answers are drawn: from the model's own distribution at a temperature, nothing cut away.

    The record holds log-probabilities over the full vocabulary, which are those of the draw only then.
    """

    temperature: Positive = 1.0
    """What logits are divided by, above 0; the learner does the same."""
    top_p: float = 1.0
    """Only 1."""
    top_k: int = -1
    """Only -1."""
    min_p: float = 0.0
    """Only 0."""

    def __post_init__(self) -> None:
        """Refuse filters. Raises `ValueError` naming the field, which msgspec shows with its path."""
        for field, neutral in NEUTRAL.items():
            if (got := getattr(self, field)) != neutral:
                raise ValueError(
                    f"{field}: got {got}, expected {neutral}: the log-probabilities of a filtered draw are "
                    f"not recorded, so the learner could not correct for it; remove {field}"
                )


class LimitsConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Processes that run other people's functions, and what ends them."""

    workers: Count = 2
    """Processes, each with one call at a time."""
    deadline_s: Positive = 10.0
    """Seconds for one call; then its process is killed with all it started."""
    memory_mb: Annotated[int, msgspec.Meta(ge=128)] = 2048
    """Address space of a process, and of each process that it starts, MiB. One whose memory in use is
    above half of it after a call is replaced."""
    start_timeout_s: Positive = 120.0
    """Seconds to start a process and import the function's module."""


class RewardPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """One of several reward functions."""

    function: str
    """`module:function`."""
    weight: float = 1.0
    """What its value is multiplied by in the sum; negative for a penalty."""
    arguments: dict[str, Any] = {}
    """More keyword arguments for it."""


class EnvironmentConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Who the policy talks to."""

    path: str = "actors.environments:SingleTurn"
    """The environment's class, `module:Class`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments for it."""
    timeout_s: Positive = 600.0
    """Seconds for one sample, generation included; after that the sample is invalid."""


class AdaptiveConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Groups generated at a time as the engine's load allows."""

    least: Count = 1
    """Fewest groups at a time."""
    most: Count = 64
    """Most groups at a time."""
    every_s: Positive = 2.0
    """Seconds between two looks at the engine's load."""
    usage_max: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    """Share of the engine's cache above which it is overloaded."""
    add: Count = 1
    """How many more, while the engine has room and groups wait for a place."""
    factor: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.75
    """What the number is multiplied by when the engine is overloaded."""


class Objective(msgspec.Struct, frozen=True):
    """What an actor needs to know of the learner's objective."""

    routing_replay: bool = False
    """Have the engine return routed experts, and hand them in with every group."""


class RolloutConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What an actor does with its leases."""

    concurrency: Count = 4
    """Groups an actor generates at a time; with `adaptive`, at first. As many more may be being scored and
    handed in meanwhile, and one lease waits for a place, unless `stream.max_staleness` is 0."""
    adaptive: AdaptiveConfig | None = None
    """Let the number follow the engine's load; absent: it stays."""
    sampling: SamplingConfig = SamplingConfig()
    """How the policy's answers are drawn."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """Who the policy talks to."""
    reward: str | dict[str, RewardPart] = "actors.rewards:gsm8k"
    """The reward function, `module:function`; or several by name, whose weighted sum is the reward. An
    empty table leaves the reward to the environment."""
    solved: float = 1.0
    """A group whose every reward is at least this counts its question as solved."""
    failed: float = 0.0
    """A group whose every reward is at most this counts its question as failed."""
    limits: LimitsConfig = LimitsConfig()
    """Processes that run the reward functions."""

    def __post_init__(self) -> None:
        """Refuse bounds that exclude the beginning. Raises `ValueError`; msgspec adds the path."""
        if (bounds := self.adaptive) and not bounds.least <= self.concurrency <= bounds.most:
            raise ValueError(
                f"concurrency: got {self.concurrency}, expected {bounds.least} to {bounds.most}, which are "
                "adaptive.least and adaptive.most; change one of the three"
            )


class EvaluationSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How answers are drawn that are only looked at: nothing is trained on them, so filters are allowed.

    What is not here is as in `rollout.sampling`.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.6
    """0 takes the likeliest token, so that all samples of a question are equal."""
    max_new_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Longest answer, tokens; 0: `rollout.sampling.max_new_tokens`."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    """Draw among the likeliest tokens that have this probability together."""
    top_k: int = 20
    """Draw among so many of the likeliest tokens; -1: all."""

    def __post_init__(self) -> None:
        """Refuse a draw from nothing. Raises `ValueError`; msgspec adds the path."""
        self.of(SamplingConfig())

    def of(self, training: SamplingConfig) -> Sampling:
        """All of it, for an engine."""
        return Sampling(
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens or training.max_new_tokens,
            stop_token_ids=training.stop_token_ids,
            ignore_eos=training.ignore_eos,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class EvaluationConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How well a version answers, measured beside training, see docs/evaluation.md."""

    every: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Versions that are multiples of this, 0 among them, are evaluated while the run goes on; 0: none."""
    start: bool = True
    """`launch demo` and `launch learner` start the evaluator beside the learner; false: `launch eval --watch`
    is started by hand, such as on a GPU of its own."""
    data: str = ""
    """Questions, as `data.path`; empty: `data.held_out`, else the training questions."""
    questions: Annotated[int, msgspec.Meta(ge=0)] = 0
    """At most so many of them, in an order that never changes; 0: all."""
    samples: Count = 8
    """Answers to each question, K."""
    sampling: EvaluationSampling = EvaluationSampling()
    """How answers are drawn; filters may be set here."""
    threshold: float = 1.0
    """An answer whose reward is at least this passes."""
    concurrency: Count = 8
    """Questions that are asked at the same time."""
