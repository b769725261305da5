"""The actor's side of rewards: answers to verdicts, by processes that may fail."""

from __future__ import annotations

import msgspec

from actors.config import LimitsConfig, RewardPart
from actors.limited.workers import Workers


class Verdict(msgspec.Struct, array_like=True, frozen=True):
    """What an answer earns."""

    value: float
    """The scalar reward, finite."""
    parts: dict[str, float]
    """Its named parts before weighting."""


class RewardPool:
    """The configured reward, in worker processes; `score` may be called for many answers at once.

    Worked example::

        pool = RewardPool("actors.rewards:gsm8k", LimitsConfig())
        await pool.score("#### 46", "#### 46", tokens=3)     # Verdict(1.0, {"correct": 1.0, "format": 1.0})
        await pool.close()

    Processes start with the first answer.
    """

    def __init__(self, reward: str | dict[str, RewardPart], limits: LimitsConfig) -> None:
        self._workers = Workers("actors.rewards.score:scorer", [msgspec.to_builtins(reward)], limits)
        self._idle = not reward

    async def score(self, text: str, answer: str, tokens: int) -> Verdict:
        """The verdict on a text with `tokens` tokens.

        Raises `SampleError` if there is none: the sample is invalid, never worth 0. Raises `LoadError` if
        the reward functions cannot be loaded.
        """
        if self._idle:
            return Verdict(0.0, {})
        return msgspec.convert(await self._workers.call(text, answer, tokens), Verdict)

    async def close(self) -> None:
        """Ends the processes. No `score` may be under way."""
        await self._workers.close()
