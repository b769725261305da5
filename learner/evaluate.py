"""How well the current weights answer, by the data set's own final answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from buffer.schema import Prompt
from learner.tokenizer import Tokenizer

if TYPE_CHECKING:
    from learner.step import Trainer

PROMPTS = 256
"""At most so many prompts are asked."""
_EXAMPLES = 3


class Evaluation(msgspec.Struct, frozen=True):
    """Accuracy at temperature 1, and a few greedy answers to look at."""

    accuracy: float
    """Share of right answers, 0 to 1; one answer a prompt."""
    prompts: int
    """How many were asked, at most `PROMPTS`."""
    examples: list[dict[str, str]]
    """`question`, `answered`, `gold`."""


def mark(text: str, gold: str) -> float:
    """1.0 if the text's final answer, after its last `####`, is the gold one; else 0.0.

    >>> mark("so #### 12", "7 + 5 = 12\\n#### 12")
    1.0
    """
    _, found, answer = text.rpartition("####")
    return float(bool(found) and answer.strip() == gold.rpartition("####")[2].strip())


def evaluate(
    trainer: Trainer, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_answer_tokens: int
) -> Evaluation:
    """Asks the trainer's current weights the first `PROMPTS` prompts."""
    asked = list(prompts[:PROMPTS])
    tokens = [prompt.tokens for prompt in asked]
    sampled = trainer.generate(tokens, max_answer_tokens, tokenizer.eos_id, temperature=1.0)
    marks = [
        mark(tokenizer.decode(answer), prompt.answer) for answer, prompt in zip(sampled, asked, strict=True)
    ]
    greedy = trainer.generate(tokens[:_EXAMPLES], max_answer_tokens, tokenizer.eos_id, temperature=0.0)
    examples = [
        {
            "question": tokenizer.decode(prompt.tokens).strip(),
            "answered": tokenizer.decode(answer),
            "gold": prompt.answer,
        }
        for prompt, answer in zip(asked, greedy, strict=False)
    ]
    return Evaluation(sum(marks) / len(marks), len(asked), examples)
