"""The turns of a conversation, laid end to end: what a sample says of its tokens.

Worked example: prompt ``[5, 6]``, the policy's ``[7, 8]`` by version 3, a tool's ``[40]``, the policy's
``[9]`` by version 4::

    tokens      [5, 6, 7, 8, 40, 9]     prompt_length 2
    logprobs          [a, b, 0., c]     0 where the policy wrote nothing
    loss_runs         [2, 1, 1]
    labels            [(3, "3:..."), (1, "4:...")]    a tool's tokens go with the version before them
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from numbers import Integral

import msgspec
import numpy as np

from actors.environments.base import Turn
from actors.errors import SampleError
from buffer.schema import Sample, Span


class Trajectory(msgspec.Struct, frozen=True, eq=False):
    """A conversation without its reward."""

    tokens: list[int]
    """Prompt ids, then answer ids. What an environment writes before the policy's first token is prompt;
    what it writes after the last one is left out."""
    prompt_length: int
    """P: how many of the tokens are prompt."""
    logprobs: list[float]
    """Of each answer token; 0 for those that are not the policy's."""
    loss_runs: list[int]
    """As in `buffer.schema.Sample`."""
    labels: list[tuple[int, str]]
    """Runs of answer tokens and the label of the version that wrote them; neighbours differ."""
    finish_reason: str
    """Of the policy's last turn, `length` where there was no room for one."""
    final: list[int]
    """Ids of that turn: what the reward function reads."""
    trained: int
    """How many answer tokens are the policy's."""
    award: float | None
    """Sum of what the environment awarded; None if it awarded nothing."""
    routed: np.ndarray | None = None
    """uint16 [T - 1, L, k]: the experts of each token but the last; None: not returned."""

    def sample(self, reward: float, rewards: dict[str, float], versions: dict[str, int]) -> Sample:
        """The record of it; `versions` numbers the labels as the group's table does."""
        return Sample(
            tokens=_array(self.tokens, np.int32),
            prompt_length=self.prompt_length,
            logprobs=_array(self.logprobs, np.float32),
            loss_runs=self.loss_runs,
            spans=[Span(length, versions[label]) for length, label in self.labels],
            reward=reward,
            rewards=rewards,
            finish_reason=self.finish_reason,
            routed=self.routed,
        )


def lay_out(prompt: Sequence[int], turns: Sequence[Turn]) -> Trajectory:
    """The trajectory of a prompt and its turns. Raises `SampleError` if the policy has no turn, or tokens
    are none or not those that it drew."""
    own = [turn for turn in turns if turn.completion is not None]
    if not own:
        raise SampleError("environment", f"it returned {len(turns)} turns, expected one of the policy's")
    for turn in turns:
        _check_tokens(turn)
    opening, answer = _parts(turns)
    last = own[-1]
    assert last.completion is not None
    awards = [turn.reward for turn in turns if turn.reward is not None]
    tokens, logprobs = [*prompt, *opening], []
    for turn in answer:
        tokens += turn.tokens
        logprobs += turn.completion.logprobs if turn.completion is not None else [0.0] * len(turn.tokens)
    return Trajectory(
        tokens=tokens,
        prompt_length=len(prompt) + len(opening),
        logprobs=logprobs,
        loss_runs=_runs([(turn.completion is not None, len(turn.tokens)) for turn in answer]),
        labels=_labels(answer),
        finish_reason=last.completion.finish_reason,
        final=last.tokens,
        trained=sum(len(turn.tokens) for turn in own),
        award=sum(awards) if awards else None,
        routed=_routed(len(prompt) + len(opening), answer),
    )


def _parts(turns: Sequence[Turn]) -> tuple[list[int], Sequence[Turn]]:
    """Tokens before the policy's first one, and the turns from that to its last one."""
    spoken = [index for index, turn in enumerate(turns) if turn.completion is not None and turn.tokens]
    if not spoken:
        return [], []
    opening = [token for turn in turns[: spoken[0]] for token in turn.tokens]
    return opening, turns[spoken[0] : spoken[-1] + 1]


def _array(values: Sequence[float], dtype: type[np.number]) -> np.ndarray:
    """What `np.array` makes of them in twice the time."""
    kind = np.dtype(dtype)
    return np.frombuffer(struct.pack(f"{len(values)}{kind.char}", *values), kind)


def _check_tokens(turn: Turn) -> None:
    """Raises `SampleError` unless they are ids, and the policy's as it drew them."""
    if turn.completion is None:
        if not all(isinstance(token, Integral) and 0 <= token < 1 << 31 for token in turn.tokens):
            raise SampleError("environment", f"got tokens {turn.tokens[:8]}, expected ids from 0 to 2^31 - 1")
    elif turn.completion.tokens != turn.tokens:
        raise SampleError(
            "environment", "it changed the tokens of the policy's turn, which must stay as drawn"
        )


def _routed(length: int, turns: Sequence[Turn]) -> np.ndarray | None:
    """The experts of `length` prompt tokens and the turns after them, as the turn that goes on from each has
    them."""
    parts: list[np.ndarray] = []
    for turn in turns:
        length += len(turn.tokens)
        if turn.completion is not None and turn.completion.routed is not None:
            got = len(turn.completion.routed)
            if got != length - 1:
                raise SampleError(
                    "environment",
                    f"it asked for a turn after {got + 1 - len(turn.tokens)} tokens, where its turns have "
                    f"{length - len(turn.tokens)}; routed experts need the whole conversation each time",
                )
            parts.append(turn.completion.routed[sum(map(len, parts)) :])
    return np.concatenate(parts) if parts else None


def _runs(parts: Sequence[tuple[bool, int]]) -> list[int]:
    """Run lengths, alternating, the first of True, of parts that are all True or all False.

    >>> _runs([(True, 2), (False, 1), (True, 1)]), _runs([(False, 1), (True, 0), (False, 1)]), _runs([])
    ([2, 1, 1], [0, 2], [])
    """
    runs: list[int] = []
    for value, length in parts:
        if length:
            while not runs or len(runs) % 2 != value:
                runs.append(0)
            runs[-1] += length
    return runs


def _labels(turns: Sequence[Turn]) -> list[tuple[int, str]]:
    """Runs of one version, from a turn of the policy's on; other tokens continue the run before them."""
    runs: list[tuple[int, str]] = []
    for turn in turns:
        if not turn.tokens:
            continue
        said = turn.completion.labels if turn.completion is not None else [(len(turn.tokens), runs[-1][1])]
        for length, label in said:
            if runs and label == runs[-1][1]:
                length += runs.pop()[0]
            runs.append((length, label))
    return runs
