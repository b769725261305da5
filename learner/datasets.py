"""Data sets of questions and gold answers, and the deterministic order in which a run asks them.

A data set is a JSONL file in GSM8K's schema: `question`, and `answer` ending in `#### <final answer>`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from buffer.schema import Prompt
from learner.config import DataConfig
from learner.errors import DataError
from learner.tokenizer import Tokenizer


class Example(msgspec.Struct, frozen=True):
    """A row of a data set."""

    row: int
    """Line of the file, from 0."""
    question: str
    answer: str
    """The solution as given, ending in `#### <final answer>`."""


class _Line(msgspec.Struct):
    question: str
    answer: str


def load_jsonl(path: Path) -> list[Example]:
    """All examples of a file. Raises `DataError` naming file and line."""
    if not path.is_file():
        raise DataError(f"data.path: no file {path}; give a JSONL file with `question` and `answer`")
    examples = []
    with path.open("rb") as lines:
        for row, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                example = msgspec.json.decode(line, type=_Line)
            except msgspec.MsgspecError as error:
                problem = f"{path}, line {row + 1}: {error}; expected an object with `question` and `answer`"
                raise DataError(problem) from error
            if "####" not in example.answer:
                problem = (
                    f"{path}, line {row + 1}: answer: got {example.answer[-40:]!r}, expected it to end in"
                )
                raise DataError(f"{problem} `#### <final answer>`")
            examples.append(Example(row, example.question, example.answer))
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return examples


class PromptOrder:
    """The endless sequence of prompts of a run: every epoch a new permutation from (seed, epoch).

    A position alone determines its prompt, so a run can be continued from any of them.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._epoch, self._order = -1, list(range(len(prompts)))

    @classmethod
    def load(cls, config: DataConfig, tokenizer: Tokenizer, seed: int) -> tuple[PromptOrder, int]:
        """The order over a data set, and how many prompts were left out as too long."""
        examples = load_jsonl(Path(config.path))
        prompts = [
            Prompt(example.row, tokenizer.prompt(example.question, config.template), example.answer)
            for example in examples
        ]
        kept = [prompt for prompt in prompts if len(prompt.tokens) <= config.max_prompt_tokens]
        if not kept:
            shortest = min(len(prompt.tokens) for prompt in prompts)
            problem = f"data.max_prompt_tokens: got {config.max_prompt_tokens}, the shortest prompt of"
            raise DataError(f"{problem} {config.path} has {shortest} tokens; raise it")
        return cls(kept, seed), len(prompts) - len(kept)

    def __len__(self) -> int:
        return len(self._prompts)

    def at(self, position: int) -> Prompt:
        """The prompt at a position of the run, from 0."""
        epoch, index = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._prompts)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
        return self._prompts[self._order[index]]

    def __iter__(self) -> Iterator[Prompt]:
        position = 0
        while True:
            yield self.at(position)
            position += 1


def held_out(config: DataConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """Prompts to measure on: those of `data.held_out`, else of the training questions themselves."""
    path = config.held_out or config.path
    order, _ = PromptOrder.load(msgspec.structs.replace(config, path=path), tokenizer, seed=0)
    return list(islice(order, len(order)))
