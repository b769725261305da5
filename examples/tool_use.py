"""A task that a tiny model learns by calling a tool: the product of two two-digit numbers.

    python -m examples.tool_use data          # writes train, held_out and demonstrations to the folder
    launch demo --family qwen3 --config examples/tool_use.toml

The warm-up shows, half of the time, a call such as `[37*46]`, else a wrong guess, and always how to go on
after the calculator has answered: `<1702>`, hence `#### 1702`. The reward has to teach which of the two pays.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

CALLS = 0.5
"""Share of the demonstrations that call the calculator; the others guess."""
HELD_OUT = 800
"""Questions that are never trained on, of 8,100."""
TIMES = 3
"""Demonstrations of each question and of its continuation."""


def write(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Rows of (question, answer) in GSM8K's schema."""
    lines = (json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows)
    path.write_text("".join(lines))


def demonstrations(questions: list[tuple[int, int]], source: random.Random) -> Iterable[tuple[str, str]]:
    """What to answer first, and what once the tool has spoken. The tokens are those of a rollout: the
    end of the policy's turn stands between its call and the output."""
    for left, right in questions * TIMES:
        call, asked = f"[{left}*{right}]", f"{left}*{right}=\n"
        yield asked, call if source.random() < CALLS else f"#### {source.randrange(100, 9900)}"
        yield f"{asked}{call}<|endoftext|><{left * right}>", f"#### {left * right}"


def main(folder: Path) -> None:
    """Writes the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(0)
    questions = [(left, right) for left in range(10, 100) for right in range(10, 100)]
    source.shuffle(questions)
    held_out, train = questions[:HELD_OUT], questions[HELD_OUT:]
    for name, asked in (("train", train), ("held_out", held_out)):
        write(folder / f"{name}.jsonl", ((f"{a}*{b}=\n", f"#### {a * b}") for a, b in asked))
    write(folder / "demonstrations.jsonl", demonstrations(train, source))
    print(f"{len(train)} questions in {folder / 'train.jsonl'}, {len(held_out)} held out")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("data"))
