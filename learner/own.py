"""Functions of the user's own, which the configuration names as `module:function`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from learner.errors import ConfigError


def find(path: str, field: str) -> Callable[..., Any]:
    """The function that `path` names. Raises `ConfigError` naming the `field` if it cannot be found.

    >>> find("math:sqrt", "objective.loss")(4.0)
    2.0
    """
    try:
        found = pkgutil.resolve_name(path)
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"{field}: got `{path}`, expected a function that can be imported: {error}; put the module on "
            "PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"{field}: got `{path}`, a {type(found).__name__}, expected a function")
    return found
