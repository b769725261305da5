"""What an SGLang server answers, as far as it is read, and what of a model's folder it goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Entry = tuple[float | None, int, str | None]
"""SGLang's log-probability of one token: value, token id, text (always absent here)."""


class Finish(msgspec.Struct):
    """Why SGLang ended an answer."""

    type: Literal["stop", "length", "abort"]


class Span(msgspec.Struct):
    """Tokens `start` to `end` (exclusive) of an answer and the label of the weights that wrote them."""

    version: str
    start: int
    end: int


class Meta(msgspec.Struct):
    """The parts of SGLang's `meta_info` that are read."""

    finish_reason: Finish
    weight_version: str
    """The label at the end of the answer."""
    weight_versions: list[Span] | None = None
    """Since SGLang 0.5.19."""
    input_token_logprobs: list[Entry] = []
    output_token_logprobs: list[Entry] = []


class Answer(msgspec.Struct):
    """One item of SGLang's answer to ``/generate``."""

    output_ids: list[int]
    meta_info: Meta

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
    num_waiting_reqs: int
    token_usage: float


class Loads(msgspec.Struct):
    """SGLang's answer to ``/v1/loads``."""

    loads: list[Rank]


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


class _Ends(msgspec.Struct):
    """The field of either file that is read."""

    eos_token_id: int | list[int] | None = None
