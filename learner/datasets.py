"""The deterministic order in which a run asks the questions of its data sets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from buffer.schema import Prompt
from learner.config import DataConfig, SourceConfig
from learner.errors import DataError
from learner.rows import Example, load_rows
from learner.tokenizer import Tokenizer


class Share(msgspec.Struct, frozen=True):
    """Prompts that follow one another in a list and have one weight: those of one source."""

    first: int
    """Index of the first."""
    count: int
    """How many there are."""
    weight: float
    """How often an epoch asks each."""

    def taken(self, seed: int, epoch: int) -> list[int]:
        """Indices that an epoch asks, in rising order.

        The source has an order of its own, without end, each pass a new permutation of all; every epoch
        takes the next round(count * weight) of it, at least one.

        >>> third = Share(10, 3, 1 / 3)
        >>> sorted(third.taken(0, 0) + third.taken(0, 1) + third.taken(0, 2))
        [10, 11, 12]
        """
        size = self.size
        passes: dict[int, list[int]] = {}
        indices = []
        for place in range(epoch * size, (epoch + 1) * size):
            number, offset = divmod(place, self.count)
            if number not in passes:
                passes[number] = list(range(self.first, self.first + self.count))
                random.Random(f"{seed}:{self.first}:{number}").shuffle(passes[number])
            indices.append(passes[number][offset])
        return sorted(indices)

    @property
    def size(self) -> int:
        """Prompts an epoch asks of it."""
        return max(1, round(self.count * self.weight))


class PromptOrder:
    """The sequence of prompts of a run: every epoch a new order from (seed, epoch).

    A position alone determines its prompt, so a run can be continued from any of them. Worked example:
    with 3 prompts and `epochs` 2, ``at(0)`` to ``at(2)`` are the three in some order,
    ``at(3)`` to ``at(5)`` in another, ``at(6)`` is None.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        seed: int,
        *,
        shares: Sequence[Share] | None = None,
        epochs: int | None = None,
    ) -> None:
        """`shares` are the sources in `prompts`, absent: one of weight 1; `epochs`: absent for no end."""
        self._prompts, self._seed = prompts, seed
        self._shares = [Share(0, len(prompts), 1.0)] if shares is None else list(shares)
        self._size = sum(share.size for share in self._shares)
        self._epochs, self._number = epochs, -1
        self._epoch: list[Prompt] | None = None

    @classmethod
    def load(cls, config: DataConfig, tokenizer: Tokenizer, seed: int) -> tuple[PromptOrder, int]:
        """The order over the configured data, and how many prompts were left out as too short or long.

        Raises `DataError` for data that cannot be read or asked. With several sources a prompt's `row`
        goes on counting from one file to the next.
        """
        prompts: list[Prompt] = []
        shares = []
        rows = asked = 0
        for source in _sources(config):
            examples = load_rows(
                source.path,
                question=source.question,
                answer=source.answer,
                marker=config.answer_marker,
            )
            kept = _prompts(examples, source, config, tokenizer, rows)
            shares.append(Share(len(prompts), len(kept), source.weight))
            prompts += kept
            rows += examples[-1].row + 1
            asked += len(examples)
        return cls(prompts, seed, shares=shares, epochs=config.epochs), asked - len(prompts)

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return self._size

    def at(self, position: int) -> Prompt | None:
        """The prompt at a position of the run, from 0; None after the last epoch."""
        number, index = divmod(position, self._size)
        if number != self._number:
            self._number, self._epoch = number, self.epoch(number)
        return None if self._epoch is None else self._epoch[index]

    def epoch(self, number: int) -> list[Prompt] | None:
        """The prompts of an epoch in its order; None after the last."""
        if self._epochs is not None and number >= self._epochs:
            return None
        order = [index for share in self._shares for index in share.taken(self._seed, number)]
        random.Random(f"{self._seed}:{number}").shuffle(order)
        return [self._prompts[index] for index in order]

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts from position 0 on, to the last epoch's end."""
        position = 0
        while (prompt := self.at(position)) is not None:
            yield prompt
            position += 1


def held_out(config: DataConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """Prompts to measure on: those of `data.held_out`, else of the training questions themselves."""
    if config.held_out:
        config = alone(config, config.held_out)
    order, _ = PromptOrder.load(config, tokenizer, seed=0)
    return list(islice(order, len(order)))


def alone(config: DataConfig, path: str) -> DataConfig:
    """The configuration of one file instead of the training data, without an end."""
    return msgspec.structs.replace(config, path=path, sources=[], epochs=None)


def _sources(config: DataConfig) -> list[SourceConfig]:
    if config.sources:
        return config.sources
    if not config.path:
        raise DataError(
            "data.path: got none; give a JSONL or Parquet file, a saved data set, or data.sources"
        )
    return [SourceConfig(path=config.path, question=config.question, answer=config.answer)]


def _prompts(
    examples: list[Example], source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, rows: int
) -> list[Prompt]:
    """Those examples of a source whose prompts have an allowed length; its rows begin at `rows`."""
    template = source.template or config.template
    prompts = [
        Prompt(
            rows + example.row,
            tokenizer.prompt(example.question, template, config.system),
            example.answer,
        )
        for example in examples
    ]
    low, high = config.min_prompt_tokens, config.max_prompt_tokens
    kept = [prompt for prompt in prompts if low <= len(prompt.tokens) <= high]
    if not kept:
        lengths = [len(prompt.tokens) for prompt in prompts]
        raise DataError(
            f"data.min_prompt_tokens, data.max_prompt_tokens: got {low} and {high}, the prompts of "
            f"{source.path} have {min(lengths)} to {max(lengths)} tokens; widen them"
        )
    return kept
