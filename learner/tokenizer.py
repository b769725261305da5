"""The tokenizer of a checkpoint folder, as far as the learner needs it: prompts and demonstrations to ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from learner.errors import DataError, ModelError

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""Everything beside the weights that an engine or a tokenizer may ask for; the first and third must exist."""


def model_files(folder: Path) -> dict[str, bytes]:
    """The configuration and tokenizer files of a checkpoint folder, by name. Raises `ModelError`."""
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise ModelError(
                f"model.path: {folder} has no {needed}; expected a Hugging Face checkpoint folder with "
                "config.json, tokenizer.json and safetensors"
            )
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation, as chat templates take it."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """Its text, without the template's special tokens."""


class Tokenizer:
    """Text to ids and back.

    Worked example: with no chat template, ``prompt("2+2", "")`` is the ids of ``"2+2\\n"``.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        model_files(folder)
        self._folder = folder
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos_id = _eos_id(folder)
        """Id that ends an answer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def prompt(self, question: str | Sequence[Message], template: str, system: str = "") -> list[int]:
        """The ids of a question put into `template`, or into the chat template if that is empty.

        A list of messages, like a `system` message, needs the chat template. Raises `DataError` where
        there is none.
        """
        if not template and self._has_chat_template:
            asked = [Message("user", question)] if isinstance(question, str) else question
            told = [Message("system", system)] if system else []
            messages = [msgspec.to_builtins(message) for message in (*told, *asked)]
            text = self._chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return self.encode(text)
        if system or not isinstance(question, str):
            needed = "data.system" if system else "a question that is a list of messages"
            raise DataError(
                f"{needed}: needs a chat template, and there is none in {self._folder}, or data.template "
                "takes its place; give questions as text, without data.system"
            )
        return self.encode((template or "{question}\n").replace("{question}", question))

    @cached_property
    def _chat(self) -> Any:
        # Rendering a chat template is Jinja as transformers sets it up, so it is left to it.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder)

    @cached_property
    def _has_chat_template(self) -> bool:
        if (self._folder / "chat_template.jinja").is_file():
            return True
        settings = self._folder / "tokenizer_config.json"
        return settings.is_file() and "chat_template" in json.loads(settings.read_text())


def _eos_id(folder: Path) -> int:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = json.loads((folder / name).read_text()).get("eos_token_id")
            if eos is not None:
                return eos[0] if isinstance(eos, list) else eos
    raise ModelError(f"{folder / 'config.json'}: eos_token_id: missing, so no answer could ever end")
