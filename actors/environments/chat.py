"""A conversation in messages, kept in tokens: for environments that were written for a chat API.

Such an environment sends the whole conversation at every turn. Here it can only be added to: the policy's
turns stay the ids that were drawn, and what comes after the last of them is written as new tokens.

Worked example, with ``ChatFormat(messages={"user": "U:{content}\\n"}, opening="A:", after="|")``::

    prompt, asked by the learner      "U:2+2?\\nA:"
    the policy                        "4"
    a message of the environment's    "|U:sure?\\nA:"
    the policy                        "yes"
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from actors.environments.base import Turn
from actors.environments.policy import Policy
from actors.environments.tool_use import ToolCall
from actors.errors import SampleError

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


QWEN = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{content}<|im_end|>\n",
    "tool": "<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n",
}
"""Messages by role as Qwen's chat template writes them."""


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How messages are written; the defaults are those of Qwen's chat template."""

    messages: dict[str, str] = msgspec.field(default_factory=QWEN.copy)
    """By role, with `{content}` for the content, which is plain text: only around it do names of special
    tokens count. Other roles cannot be written."""
    opening: str = "<|im_start|>assistant\n"
    """What the policy goes on from."""
    after: str = "\n"
    """What follows the end-of-sequence token of the policy's turn."""

    def __post_init__(self) -> None:
        """Refuse messages without a content. Raises `ValueError`."""
        for role, text in self.messages.items():
            if text.count("{content}") != 1:
                raise ValueError(f"messages.{role}: got {text!r}, expected one {{content}} in it")


class Message(msgspec.Struct, frozen=True):
    """What is compared and written of a message."""

    role: str
    """Such as `user`, `assistant` or `tool`."""
    content: str
    """Text; what is no text is refused."""


class Chat:
    """One conversation: `reply` for each turn of the policy's, then `turns`."""

    def __init__(
        self, policy: Policy, prompt: Sequence[int], asked: Sequence[Mapping[str, Any]], form: ChatFormat
    ) -> None:
        """`prompt`: the tokens of the messages `asked`, up to where the policy begins."""
        self._policy, self._form = policy, form
        self._context, self._seen = list(prompt), [message_of(message) for message in asked]
        self.turns: list[Turn] = []
        """What followed the prompt, in order."""

    @property
    def finish_reason(self) -> str:
        """Of the policy's last turn."""
        assert self.turns[-1].completion is not None
        return self.turns[-1].completion.finish_reason

    async def reply(
        self, messages: Sequence[Mapping[str, Any]], *, tools: bool = False
    ) -> tuple[str, list[ToolCall]]:
        """The policy's turn after `messages`, the whole conversation so far: its text, and with `tools` the
        calls at its end. Empty, with the finish reason `length`, where there was no room.

        Raises `SampleError` if it is not what was seen before and messages after that, `EngineError`.
        """
        told = [message_of(message) for message in messages]
        self._agrees(told)
        if self.turns:
            for turn in self._written(told[len(self._seen) :]):
                self._add(turn)
        self._add(await self._policy.generate(self._context))
        text = self._policy.read(self.turns[-1])
        content, calls = split(text) if tools else (text, [])
        self._seen = [*told, Message("assistant", content)]
        return content, calls

    def _agrees(self, told: list[Message]) -> None:
        for index, (before, now) in enumerate(itertools.zip_longest(self._seen, told)):
            fresh = before is None and self.turns
            if before != now and not fresh:
                raise SampleError(
                    "environment",
                    f"message {index} of the conversation was {before}, is {now}; what has been asked or "
                    "generated is tokens already, and can only be added to",
                )

    def _written(self, messages: list[Message]) -> list[Turn]:
        turns = [self._policy.write(self._form.after, markup=True)]
        for message in messages:
            if message.role not in self._form.messages:
                known = ", ".join(self._form.messages)
                raise SampleError("environment", f"role: got {message.role!r}, expected one of {known}")
            before, _, behind = self._form.messages[message.role].partition("{content}")
            turns += [self._policy.write(before, markup=True), self._policy.write(message.content)]
            turns.append(self._policy.write(behind, markup=True))
        return [*turns, self._policy.write(self._form.opening, markup=True)]

    def _add(self, turn: Turn) -> None:
        self.turns.append(turn)
        self._context += turn.tokens


def message_of(message: Mapping[str, Any]) -> Message:
    """A message of a chat API. Raises `SampleError` for one that is not text alone."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        parts = list(content)
        if any(part.get("type") != "text" for part in parts):
            kinds = ", ".join(sorted({str(part.get("type")) for part in parts}))
            raise SampleError("environment", f"a message has parts of type {kinds}, expected text alone")
        content = "".join(part["text"] for part in parts)
    return Message(message["role"], content)


def split(text: str) -> tuple[str, list[ToolCall]]:
    """The text before the tool calls in a turn, and the calls, as Qwen and Hermes models write them.

    A call that is none leaves the whole turn a text, as SGLang's and vLLM's parsers do.

    >>> split('I add.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    ('I add.', [ToolCall(name='add', arguments={'a': 1})])
    >>> split('I add.<tool_call>add(1)</tool_call>')
    ('I add.<tool_call>add(1)</tool_call>', [])
    """
    try:
        calls = [msgspec.json.decode(found, type=ToolCall) for found in _CALL.findall(text)]
    except msgspec.MsgspecError:
        return text, []
    return (text.partition("<tool_call>")[0] if calls else text), calls
