"""What an SGLang server answers, as far as it is read, and what of a model's folder it goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pybase64

from actors.errors import EngineError


class Entry(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """SGLang's log-probability of one token; its text, which comes third, is always absent here."""

    value: float | None
    """None: not computed, or no number."""
    token: int
    """Id of the token."""


class Finish(msgspec.Struct):
    """Why SGLang ended an answer."""

    type: Literal["stop", "length", "abort"]
    """`stop`: it ended itself; `length`: at the token limit; `abort`: before its time."""


class Span(msgspec.Struct):
    """Tokens `start` to `end` (exclusive) of an answer and the label of the weights that wrote them."""

    version: str
    """Such as `12:<digest>`, see `Manifest.label`."""
    start: int
    """Index in the answer, from 0."""
    end: int
    """One behind the last."""


class Meta(msgspec.Struct):
    """The parts of SGLang's `meta_info` that are read."""

    finish_reason: Finish
    """Of the answer as it stands here."""
    weight_version: str
    """The label at the end of the answer."""
    weight_versions: list[Span] | None = None
    """Since SGLang 0.5.19."""
    input_token_logprobs: list[Entry] = []
    """Of each prompt token; empty unless asked for."""
    output_token_logprobs: list[Entry] = []
    """Of each answer token; empty unless asked for."""
    routed_experts: str = ""
    """int32 [tokens - 1, L, k] of the whole sequence, in base64; empty unless asked for."""


class Answer(msgspec.Struct):
    """One item of SGLang's answer to ``/generate``."""

    output_ids: list[int]
    """Ids of the answer's tokens, without the prompt."""
    meta_info: Meta
    """How it ended, and who wrote it."""

    def labels(self) -> list[tuple[int, str]]:
        """Runs of tokens and the label of the weights that wrote them; lengths sum to that of `output_ids`.

        A server that does not say so wrote all of them under the label of their end, if it was idle for
        every update.
        """
        spans = self.meta_info.weight_versions
        if spans is None:
            return [(len(self.output_ids), self.meta_info.weight_version)]
        return [(span.end - span.start, span.version) for span in spans]


class Rank(msgspec.Struct):
    """The parts of one rank's load that are read."""

    num_running_reqs: int
    """Samples being generated."""
    num_waiting_reqs: int
    """Samples that wait in the server."""
    token_usage: float
    """Share of the key-value cache in use, 0 to 1."""


class Loads(msgspec.Struct):
    """SGLang's answer to ``/v1/loads``."""

    loads: list[Rank]
    """One a data-parallel rank of the server."""


def end_tokens(model: Path) -> frozenset[int]:
    """The end-of-sequence tokens of a Hugging Face folder, as SGLang finds them: those of config.json and of
    generation_config.json."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            named = msgspec.json.decode((model / name).read_bytes(), type=_Ends).eos_token_id
            if named is not None:
                found.update(named if isinstance(named, list) else [named])
    return frozenset(found)


def expert_layers(model: Path) -> tuple[int, int]:
    """L and k of a Hugging Face folder: layers, and experts that a token is sent to in one of them.

    Raises `EngineError` for a model without experts.
    """
    found = msgspec.json.decode((model / "config.json").read_bytes(), type=_Experts)
    if not found.num_experts_per_tok:
        raise EngineError(
            f"{model}: config.json has no num_experts_per_tok, so there are no routed experts to return; set "
            "objective.routing_replay to false"
        )
    return found.num_hidden_layers, found.num_experts_per_tok


def routed_experts(encoded: str, layers: tuple[int, int], tokens: int) -> np.ndarray:
    """uint16 [tokens - 1, L, k]: the experts of a sequence, `layers` being (L, k). Raises `ValueError`."""
    found = np.frombuffer(pybase64.b64decode(encoded, validate=True), np.int32)
    if found.size != (tokens - 1) * layers[0] * layers[1]:
        raise ValueError(
            f"got {found.size} routed experts, expected {tokens - 1} x {layers[0]} x {layers[1]}"
        )
    if found.size and not 0 <= found.min() <= found.max() < 1 << 16:
        raise ValueError(f"got experts {found.min()} to {found.max()}, expected 0 to 65535")
    return found.astype(np.uint16).reshape(tokens - 1, *layers)


class _Experts(msgspec.Struct):
    """The fields of config.json that are read."""

    num_hidden_layers: int
    """L."""
    num_experts_per_tok: int = 0
    """k; 0: no experts."""


class _Ends(msgspec.Struct):
    """The field of either file that is read."""

    eos_token_id: int | list[int] | None = None
    """One or several; None: this file names none."""
