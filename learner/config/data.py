"""Which questions a run asks."""

from __future__ import annotations

from typing import Annotated

import msgspec

from learner.config.bounds import Count, Positive
from learner.errors import ConfigError


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
