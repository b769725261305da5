"""Text and token ids by the run's own tokenizer file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers


class Tokens:
    """A tokenizer that never takes plain text for a special token.

    Worked example: with a special token `<eos>` of id 2, ``encode("<eos>", markup=True)`` is ``[2]``, and
    ``encode("<eos>")`` is the ids of its five characters' text, which decodes to ``"<eos>"``.
    """

    def __init__(self, file: Path) -> None:
        """Reads `tokenizer.json`."""
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Ids of a text, nothing added; `markup`: special tokens stand in it by their names."""
        self._tokenizer.encode_special_tokens = not markup
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text
