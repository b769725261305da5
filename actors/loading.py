"""Finding what a configuration names as `module:name`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from actors.errors import LoadError


def find(path: str, field: str) -> Any:
    """The callable that `path` names. Raises `LoadError` naming the configuration's `field`.

    >>> find("actors.rewards:gsm8k", "rollout.reward").__name__
    'gsm8k'
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise LoadError(f"{field}: got {path!r}, expected `module:name`, such as actors.rewards:gsm8k")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"{field}: cannot load {path!r}: {error}; name something in a module that the actors' Python "
            "can import"
        ) from error
    if not callable(found):
        raise LoadError(f"{field}: {path!r} is {type(found).__name__}, expected a function or class")
    return found
