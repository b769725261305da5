"""The protocol of an environment, and the one that just asks.

Worked example: a prompt ``[5, 6]``, an answer ``[7, 8]``, a tool's output ``[40, 41]``, an answer ``[9]``::

    turns = [policy's (7, 8), environment's (40, 41), policy's (9)]
    tokens [5, 6, 7, 8, 40, 41, 9]    loss mask over the answer [1, 1, 0, 0, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from actors.continuation import Completion
from actors.errors import LoadError
from actors.loading import find
from buffer.schema import Prompt

if TYPE_CHECKING:
    from actors.config import EnvironmentConfig
    from actors.environments.policy import Policy


class Turn(msgspec.Struct, frozen=True):
    """A run of tokens by one author. Token ids are kept as they were generated, never written anew."""

    tokens: list[int]
    """Token ids; for the policy's, the end-of-sequence or stop token that ended it included."""
    completion: Completion | None = None
    """What the engine said of the tokens; absent: the environment wrote them, and they are not trained."""
    reward: float | None = None
    """What the environment awards for the conversation up to here; the awards of all turns are added to
    the sample's reward and recorded as its part `environment`. Absent: nothing."""


class Environment:
    """Base of environments. One object serves all samples of an actor, many at the same time."""

    async def run(self, example: Prompt, policy: Policy) -> list[Turn]:
        """One conversation about `example`, as its turns after the prompt, in order.

        Called once a sample. Anything it raises makes the sample invalid. It runs in the actor's own
        event loop, so it must not block: what computes belongs into `actors.limited`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no run(example, policy)")

    async def close(self) -> None:
        """Frees what it holds. Called once, when no `run` is under way."""


class SingleTurn(Environment):
    """One prompt, one answer."""

    async def run(self, example: Prompt, policy: Policy) -> list[Turn]:
        """The policy's answer."""
        return [await policy.generate(example.tokens)]


def load_environment(config: EnvironmentConfig) -> Environment:
    """The configured environment. Raises `LoadError` naming the field."""
    field = "rollout.environment"
    made: Any = find(config.path, f"{field}.path")
    try:
        environment = made(**config.arguments)
    except (TypeError, ValueError) as error:
        raise LoadError(
            f"{field}.arguments: {config.path} refuses {config.arguments}: {error}; correct them"
        ) from error
    if not isinstance(environment, Environment):
        raise LoadError(
            f"{field}.path: {config.path} made a {type(environment).__name__}, expected a class derived from "
            "actors.environments:Environment"
        )
    return environment
