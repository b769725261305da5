"""Data sets of `verifiers`' environments, in our schema."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from launch.errors import LaunchError
from launch.reasoning import HELD_OUT_SHARE

TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""How Qwen's chat template tells a model of its tools, at the end of the system message."""


def write_verifiers(path: str, folder: Path, *, arguments: dict[str, Any]) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl` of the environment that `path` makes from `arguments`.

    A line is ``{"question": messages, "answer": ...}``; the answer is a `Task` of the adapter in JSON. Held
    out is the environment's evaluation data, or else a fifth of its rows. Raises `LaunchError`.
    """
    from actors.environments.verifiers import load
    from actors.errors import LoadError

    try:
        environment = load(path, arguments)
    except LoadError as error:
        raise LaunchError(f"--verifiers: {error}") from error
    rows = _rows(environment, environment.dataset or [])
    other = _rows(environment, environment.eval_dataset or [])
    if not other:
        split = max(1, int(len(rows) * HELD_OUT_SHARE))
        other, rows = rows[:split], rows[split:]
    if not rows:
        raise LaunchError(f"--verifiers: {path} has no training data, expected two rows or more")
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    train.write_text("".join(rows))
    held_out.write_text("".join(other))
    return train, held_out


def arguments_of(text: str) -> dict[str, Any]:
    """What `--arguments` says. Raises `LaunchError`."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise LaunchError(f"--arguments: got {text}: {error}; expected an object in JSON") from error


def _rows(environment: Any, data: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of the file."""
    return [_row(row, environment.oai_tools) for row in data]


def _row(row: dict[str, Any], tools: list[dict[str, Any]] | None) -> str:
    from actors.environments.chat import message_of
    from actors.errors import SampleError

    try:
        told = [message_of(message) for message in row["prompt"]]
    except SampleError as error:
        raise LaunchError(f"--verifiers: row {row['example_id']}: {error}") from error
    question = [{"role": message.role, "content": message.content} for message in told]
    if tools:
        described = TOOLS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if question[0]["role"] == "system":
            described = f"{question.pop(0)['content']}\n\n{described}"
        question.insert(0, {"role": "system", "content": described})
    kept = {name: row[name] for name in ("prompt", "example_id", "answer", "task", "info") if name in row}
    return json.dumps({"question": question, "answer": json.dumps(kept)}) + "\n"
