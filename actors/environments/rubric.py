"""The processes' side of `verifiers`: rubrics and tools, as `actors.limited` runs them.

Of a rubric its functions and weights are used, not its own way of calling them, which takes a function
that raised for one that returned 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from actors.errors import RewardError, ToolError


class Weighted(msgspec.Struct, frozen=True):
    """A reward function of a rubric."""

    function: Callable[..., Any]
    """Its parameters are filled by name; it may be `async`."""
    weight: float
    """Factor in the sum, never 0."""
    objects: dict[str, Any]
    """What the rubric offers to its functions by name, such as `parser`."""


def weighted(rubric: Any) -> list[Weighted]:
    """The functions of a rubric, or of a group of them, that count for the reward.

    Raises `ValueError` for a rubric that compares rollouts of a group or scores in its own way.
    """
    from verifiers import Rubric, RubricGroup

    if isinstance(rubric, RubricGroup):
        return [function for part in rubric.rubrics for function in weighted(part)]
    if type(rubric).score_rollout is not Rubric.score_rollout:
        raise ValueError(f"{type(rubric).__name__} has a score_rollout of its own, expected functions")
    found = []
    for function, weight in zip(rubric.funcs, rubric.weights, strict=True):
        if weight and rubric._is_group_func(function):
            raise ValueError(f"{function.__name__} scores a group at once, expected one rollout at a time")
        if weight:
            found.append(Weighted(function, float(weight), rubric.class_objects))
    return found


def handler(path: str, arguments: dict[str, Any]) -> Callable[..., Awaitable[Any]]:
    """What a process runs for an environment: ``("score", state)`` to the reward, ``("tool", name,
    arguments)`` to a tool's output. Raises `LoadError`."""
    from verifiers.types import State

    from actors.environments.verifiers import load

    environment = load(path, arguments)
    functions = weighted(environment.rubric)

    async def handle(what: str, *details: Any) -> Any:
        if what == "score":
            return await reward(functions, State(details[0]))
        name, named = details
        if name not in environment.tool_map:
            raise ToolError(f"no tool {name!r}, there are {', '.join(environment.tool_map)}")
        output = environment.tool_map[name](**named)
        return str(await output if inspect.isawaitable(output) else output)

    return handle


async def reward(functions: list[Weighted], state: Any) -> float:
    """The weighted sum for one rollout. Raises what a function raises, `RewardError` for no finite number."""
    offered = {name: state.get(name) for name in ("prompt", "completion", "task")}
    offered |= {"answer": state.get("answer", ""), "info": state.get("info", {}), "state": state}
    total = 0.0
    for part in functions:
        wanted = inspect.signature(part.function).parameters.values()
        given = offered | part.objects
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in wanted):
            names = {parameter.name for parameter in wanted}
            given = {name: value for name, value in given.items() if name in names}
        value = part.function(**given)
        value = await value if inspect.isawaitable(value) else value
        total += part.weight * _finite(part.function.__name__, value)
    return total


def _finite(name: str, value: Any) -> float:
    """Any kind of number that is one, as theirs may come from numpy."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"{name} returned {value!r:.200}, expected a finite number")
    return number
