"""Environments of the package `verifiers`, as environments of ours.

    [rollout]
    reward = {}                                       # the environment's rubric is the reward
    [rollout.environment]
    path = "actors.environments.verifiers:Verifiers"
    arguments = { environment = "my_module:load_environment", arguments = { max_turns = 3 } }

Its data set goes to the learner as a file, which `launch data --verifiers my_module:load_environment` writes.
Single turns, several turns and tools, in messages; needs the extra `verifiers`.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec

from actors.config import LimitsConfig
from actors.environments.base import Environment, Turn
from actors.environments.chat import Chat, ChatFormat
from actors.environments.policy import Policy
from actors.environments.tool_use import ToolCall
from actors.errors import ActorError, LoadError
from actors.limited.workers import Workers
from actors.loading import find
from buffer.schema import Prompt

FIELD = "rollout.environment.arguments.environment"
"""Where the configuration names the function that makes the environment."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What an environment of theirs takes over when it is made."""


class Task(msgspec.Struct, frozen=True):
    """A row of a data set of theirs, as our gold answer holds it in JSON."""

    prompt: list[dict[str, Any]]
    """The messages that the environment believes to have asked."""
    example_id: int
    """Its number in their data set."""
    answer: str = ""
    """What the rubric holds answers against; may be empty."""
    task: str = "default"
    """Name of the task, by which groups of environments choose one."""
    info: dict[str, Any] | str = {}
    """More for the rubric, as the data set has it."""


class Verifiers(Environment):
    """Runs an environment of theirs: the policy answers its requests, its rubric awards the reward.

    Rollouts run in the actor's event loop; the rubric's functions, and the tools of a plain `ToolEnv`, in
    processes under `limits`. A function that raises, or any other failure, makes the sample invalid; a
    tool's failure is told to the policy, as they do. Functions of weight 0 are not called.
    """

    def __init__(
        self,
        *,
        environment: str,
        arguments: dict[str, Any] | None = None,
        chat: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
    ) -> None:
        """`environment`: `module:function`, called with `arguments`; `chat`: fields of `ChatFormat`;
        `limits`: of `LimitsConfig`. Raises `LoadError`, and `ValueError` for what makes no sense."""
        self._form = msgspec.convert(chat or {}, ChatFormat)
        self._environment = load(environment, arguments or {})
        limited = msgspec.convert({"memory_mb": 4096} | (limits or {}), LimitsConfig)
        self._workers = Workers("actors.environments.rubric:handler", [environment, arguments or {}], limited)
        _move_tools(self._environment, partial(self._workers.call, "tool"))

    async def run(self, example: Prompt, policy: Policy) -> list[Turn]:
        """One rollout of theirs and its award."""
        task = msgspec.json.decode(example.answer, type=Task)
        chat = Chat(policy, example.tokens, task.prompt, self._form)
        client = SimpleNamespace(
            chat=SimpleNamespace(completions=SimpleNamespace(create=partial(_create, chat)))
        )
        state = await self._environment.rollout(msgspec.structs.asdict(task), client, "policy", {})
        if state["error"] is not None:
            raise _cause(state["error"])
        reward = await self._workers.call("score", plain(state))
        return [*chat.turns, policy.write("", reward=reward)]

    async def close(self) -> None:
        """Tears the environment down and ends the processes."""
        await self._environment._teardown()
        self._environment._teardown_handlers.clear()  # it would be done again when the process ends
        await self._workers.close()


def load(path: str, arguments: dict[str, Any]) -> Any:
    """The environment that `path` makes; what it registers for signals is taken back.

    Raises `LoadError` if the package or the function is missing, or it makes nothing that can be run here.
    """
    try:
        import verifiers
    except ImportError as error:
        raise LoadError(f"{FIELD}: {error}; install the extra: slipstream[verifiers]") from error
    from actors.environments.rubric import weighted

    make = find(path, FIELD)
    try:
        with _signals_kept():
            made = make(**arguments)
        if not isinstance(made, verifiers.Environment):
            raise ValueError(f"it made a {type(made).__name__}, expected an environment of verifiers")
        if made.message_type != "chat":
            raise ValueError(f"its message_type is {made.message_type!r}, expected 'chat'")
        weighted(made.rubric)
    except (TypeError, ValueError) as error:
        raise LoadError(f"{FIELD}: {path} with {arguments}: {error}") from error
    return made


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a rollout's state is plain data, for a function in another process."""
    steps = [
        {name: value for name, value in step.items() if name not in ("response", "tokens")}
        for step in state["trajectory"]
    ]
    kept: dict[str, Any] = {}
    for name, value in {**state, "trajectory": steps}.items():
        with contextlib.suppress(TypeError):
            msgspec.json.encode(value)
            kept[name] = value
    return kept


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _move_tools(environment: Any, call: Callable[..., Any]) -> None:
    """Has the tools of a plain `ToolEnv` run by `call(name, arguments)`; others share state with it."""
    from verifiers import StatefulToolEnv, ToolEnv

    def elsewhere(name: str) -> Callable[..., Any]:
        async def use(**arguments: Any) -> Any:
            return await call(name, arguments)

        return use

    if isinstance(environment, ToolEnv) and not isinstance(environment, StatefulToolEnv):
        environment.tool_map = {name: elsewhere(name) for name in environment.tool_map}


async def _create(
    chat: Chat, *, model: str, messages: Sequence[Mapping[str, Any]], tools: Any = None, **sampling: Any
) -> Any:
    """Stands for `client.chat.completions.create`; the sampling is the run's own.

    Raises openai's `BadRequestError` for a context that is full, which ends a rollout of theirs as truncated.
    """
    from openai.types.chat import ChatCompletion

    if sampling:
        raise ValueError(f"the environment sets {', '.join(sampling)}; set rollout.sampling instead")
    content, calls = await chat.reply(messages, tools=bool(tools))
    if not chat.turns[-1].tokens:
        raise _full(model)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    choice = {"index": 0, "message": message, "finish_reason": chat.finish_reason}
    answer = {"id": "", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
    return ChatCompletion.model_validate(answer)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": msgspec.json.encode(call.arguments).decode()}
    return {"id": secrets.token_hex(8), "type": "function", "function": function}


def _full(model: str) -> Exception:
    import httpx
    from openai import BadRequestError

    text = "the conversation exceeds the model's context length"
    request = httpx.Request("POST", f"policy://{model}")
    return BadRequestError(text, response=httpx.Response(400, text=text, request=request), body=None)


def _cause(error: BaseException) -> BaseException:
    """What they wrapped: an error of ours, as an engine's, or else where it began; theirs say nothing."""
    while error.__cause__ is not None and not isinstance(error, ActorError):
        error = error.__cause__
    return error
