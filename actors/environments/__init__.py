"""Environments: who the policy talks to while a sample is made.

An environment turns a prompt into turns, some written by the policy, some not. `base` is the protocol;
`actors.environments:SingleTurn` is the default, `actors.environments:ToolUse` lets the policy call tools.
"""

from actors.environments.base import Environment, SingleTurn, Turn
from actors.environments.policy import Policy
from actors.environments.tool_use import ToolUse

__all__ = ["Environment", "Policy", "SingleTurn", "ToolUse", "Turn"]
