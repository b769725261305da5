"""Finding what a configuration names as `module:name`, and calling it."""

from __future__ import annotations

import asyncio
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from actors.errors import LoadError


def find(path: str, field: str) -> Any:
    """The callable that `path` names. Raises `LoadError` naming the configuration's `field`.

    >>> find("actors.rewards:gsm8k", "rollout.reward").__name__
    'gsm8k'
    """
    if not all(path.partition(":")):
        raise LoadError(f"{field}: got {path!r}, expected `module:name`, such as actors.rewards:gsm8k")
    try:
        found = pkgutil.resolve_name(path)
    except (ValueError, ImportError, AttributeError) as error:
        raise LoadError(
            f"{field}: cannot load {path!r}: {error}; name something in a module that the actors' Python "
            "can import"
        ) from error
    if not callable(found):
        raise LoadError(f"{field}: {path!r} is {type(found).__name__}, expected a function or class")
    return found


class Caller:
    """Calls functions, `async` or not, from where no event loop runs.

    What is awaited shares one event loop, made when it is first needed, so that a function may keep a
    client open from call to call; a plain function runs outside of it and may use loops of its own.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
        """What the function returns, awaited if need be. Raises what it raises."""
        result = function(*arguments, **named)
        if not inspect.isawaitable(result):
            return result
        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(result)
