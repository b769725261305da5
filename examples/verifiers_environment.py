"""An environment of the package `verifiers`, run as it is: letters to count, with a tool that counts.

It takes `pip install "slipstream[verifiers]"`. In a run's TOML file, with this repository on the actors'
PYTHONPATH:

    [data]
    path = "letters/train.jsonl"
    answer_marker = "example_id"
    [rollout]
    reward = {}
    [rollout.environment]
    path = "actors.environments.verifiers:Verifiers"
    arguments = { environment = "examples.verifiers_environment:load_environment" }

`python -m examples.verifiers_environment letters` writes its questions for the learner, as `launch data
--verifiers examples.verifiers_environment:load_environment --out letters` does.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import verifiers as vf
from datasets import Dataset

from launch.verifiers import write_verifiers


def count(word: str, letter: str) -> int:
    """Says how often a letter stands in a word."""
    return word.count(letter)


def right(completion: list[dict[str, str]], answer: str) -> float:
    """1 for a last message that ends in the number."""
    return float(completion[-1]["content"].endswith(answer))


def load_environment(words: Sequence[str] = ("strawberry", "banana", "mississippi")) -> vf.Environment:
    """Made in the actor, which runs it, and in the processes that run its tool and its rubric."""
    rows = [{"question": f"How many s in {word}?", "answer": str(word.count("s"))} for word in words]
    return vf.ToolEnv(tools=[count], dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[right]))


if __name__ == "__main__":
    files = write_verifiers(f"{__spec__.name}:load_environment", Path(sys.argv[1]), arguments={})
    for file in files:
        print(len(file.read_text().splitlines()), "questions in", file.name)
