"""What the benchmarks share: options, progress, a private server, tables.

options = parse("what this measures")                # --json, --quick
with server("always") as local:
    ...
report(result, table(["way", "ms"], rows), options)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buffer.local_server import LocalServer


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", action="store_true", help="the last line printed is one JSON object")
    options.add_argument("--quick", action="store_true", help="a few seconds; its figures mean nothing")
    return options


def progress(text: str) -> None:
    """Says on stderr what is being done."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def server(appendfsync: str) -> Iterator[LocalServer]:
    """A private server in a temporary folder, gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="slipstream-bench-") as folder,
        LocalServer.start(Path(folder), appendfsync=appendfsync) as local,
    ):
        yield local


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits.

    >>> print(table(["way", "ms"], [["raw", 1.23456]]))
    | way | ms |
    |---|---|
    | raw | 1.23 |
    """
    lines = [headings, ["---"] * len(headings), *rows]
    text = ["|".join(["", *(f" {_cell(value)} " for value in line), ""]) for line in lines]
    text[1] = "|" + "---|" * len(headings)
    return "\n".join(text)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def report(result: dict[str, Any], text: str, options: argparse.Namespace) -> None:
    """Prints the text, and with --json one line with the result."""
    print(text)
    if options.json:
        print(json.dumps(result))
