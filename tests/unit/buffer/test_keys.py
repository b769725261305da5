"""The table of keys and the function library name the same keys, and no other."""

from __future__ import annotations

import re

import pytest

from buffer.client import library_source
from buffer.keys import KEYS, RUNS, key


def test_the_header_of_the_library_lists_the_table() -> None:
    header, _, _ = library_source().partition("local function")
    listed: set[str] = set()
    for names in re.findall(
        r"^-- (?:\{run\}:)?([a-z_:<>, ]+?)  +(?:set|string|hash|zset|list|stream)[ ,]", header, re.M
    ):
        listed.update(name.strip().partition(":")[0] for name in names.split(","))
    assert listed == {row.name for row in KEYS} | {RUNS}


def test_every_key_the_library_touches_is_in_the_table() -> None:
    touched = set(re.findall(r"\b(?:K|C\.key)\.([a-z_]+)", library_source()))
    assert touched <= {row.name for row in KEYS}
    functions = {row.name for row in KEYS if row.owner == "functions"}
    assert functions <= touched, "the table says that the functions write these"


def test_a_key_is_named_for_its_run() -> None:
    assert key("demo", "counts") == "{demo}:counts"
    assert key("demo", "mail:actor-1") == "{demo}:mail:actor-1"
    with pytest.raises(AssertionError, match="other"):
        key("demo", "other")


def test_no_key_stands_twice() -> None:
    names = [row.name for row in KEYS]
    assert len(names) == len(set(names))
    assert all(row.holds and row.lifetime for row in KEYS)
