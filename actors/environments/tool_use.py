"""A conversation in which the policy may call tools."""

from __future__ import annotations

from typing import Any

import msgspec

from actors.config import LimitsConfig
from actors.environments.base import Environment, Turn
from actors.environments.policy import Policy
from actors.errors import SampleError
from actors.limited.workers import Workers
from buffer.schema import Prompt

TOOLS = {
    "calculator": "actors.limited.tools:calculator",
    "python": "actors.limited.tools:python",
}
"""The tools that ship, by name."""


class ToolCall(msgspec.Struct, frozen=True):
    """A call as Qwen and Hermes models write it: ``{"name": "calculator", "arguments": {...}}``."""

    name: str
    """As the policy wrote it; there may be no such tool."""
    arguments: dict[str, Any] = {}
    """By name, JSON values as the policy wrote them."""


class ToolUse(Environment):
    """The policy answers; when a turn ends in a call, the tool's output follows, and the policy goes on.

    A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` at the end of a turn. The output
    is put between `before` and `after`, which may name special tokens; it is not trained, and text in it
    that looks like a special token is none. Whatever goes wrong in a tool is told to the policy.
    The conversation ends with a turn without a call, with the tokens of an answer, or after `max_turns`.
    """

    def __init__(
        self,
        *,
        tools: dict[str, str] = TOOLS,
        max_turns: int = 4,
        opening: str = "<tool_call>",
        closing: str = "</tool_call>",
        before: str = "\n<tool_response>\n",
        after: str = "\n</tool_response>\n",
        bare: str = "",
        output_characters: int = 2000,
        limits: dict[str, Any] | None = None,
    ) -> None:
        """`tools` maps names to `module:function`, called with the arguments by name in processes under
        `limits` (fields of `LimitsConfig`). `bare` names a tool that gets all the text between `opening`
        and `closing` as its only argument instead: ``[2+3]`` is enough for a tiny model. Longer outputs
        than `output_characters` are cut. Raises `ValueError` for what makes no sense."""
        if max_turns < 1:
            raise ValueError(f"max_turns: got {max_turns}, expected 1 or more")
        if bare and bare not in tools:
            raise ValueError(f"bare: got {bare!r}, expected one of {', '.join(tools)}")
        if not (opening and closing):
            raise ValueError("opening and closing: got an empty one, expected text that marks a call")
        self._max_turns, self._bare, self._output_characters = max_turns, bare, output_characters
        self._opening, self._closing, self._before, self._after = opening, closing, before, after
        limited = msgspec.convert({"deadline_s": 5.0, "memory_mb": 512} | (limits or {}), LimitsConfig)
        self._workers = Workers("actors.limited.tools:toolbox", [tools], limited)

    async def run(self, example: Prompt, policy: Policy) -> list[Turn]:
        """The turns of one conversation."""
        turns: list[Turn] = []
        context = list(example.tokens)
        for number in range(1, self._max_turns + 1):
            turn = await policy.generate(context)
            turns.append(turn)
            call = self.call_in(policy.read(turn))
            if call is None or number == self._max_turns or not policy.room([*context, *turn.tokens]):
                break
            added = self._response(policy, await self._output(call))
            turns += added
            context += [token for new in (turn, *added) for token in new.tokens]
        return turns

    def call_in(self, text: str) -> str | None:
        """What stands in the call at the end of a text; None if there is none.

        >>> ToolUse().call_in('I add.<tool_call>{"name": "calculator"}</tool_call> ')
        '{"name": "calculator"}'
        """
        text = text.rstrip()
        if not text.endswith(self._closing):
            return None
        _, opened, inside = text.removesuffix(self._closing).rpartition(self._opening)
        return inside.strip() if opened else None

    async def close(self) -> None:
        """Ends the tools' processes."""
        await self._workers.close()

    async def _output(self, call: str) -> str:
        """What the policy is told of a call."""
        try:
            wanted = ToolCall(self._bare) if self._bare else msgspec.json.decode(call, type=ToolCall)
            output = await self._workers.call(wanted.name, [call] if self._bare else wanted.arguments)
        except msgspec.MsgspecError as error:
            output = f"error: no tool call: {error}"
        except SampleError as error:
            output = f"error: {error}"
        return str(output)[: self._output_characters]

    def _response(self, policy: Policy, output: str) -> list[Turn]:
        parts = [policy.write(self._before, markup=True), policy.write(output)]
        return [*parts, policy.write(self._after, markup=True)]
