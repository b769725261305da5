"""Asking an engine, by mail to its actor, for the log-probabilities of token sequences."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec

from buffer.client import Stream
from weightsync.protocol import Score, Scores, encode_request


def ask_scores(
    stream: Stream, actor: str, epoch: str, sequences: Sequence[Sequence[int]], deadline: float
) -> Scores | None:
    """The actor's answer, None if there is none by `deadline` (of `time.monotonic`).

    `epoch` is the actor's, as its record says. Answers to earlier requests are passed over.
    """
    request = Score(epoch, secrets.token_hex(8), [list(tokens) for tokens in sequences])
    # Should a lost reply have it asked twice, the second answer is passed over.
    stream.patiently(lambda: stream.redis.rpush(stream.key(f"mail:{actor}"), encode_request(request)))
    while (left := deadline - time.monotonic()) > 0:
        mail = stream.take(stream.key(f"scores:{actor}"), min(1.0, max(0.1, left)))
        if mail is not None:
            scores = msgspec.json.decode(mail, type=Scores)
            if scores.request == request.request:
                return scores
    return None
