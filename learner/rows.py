"""Rows of data sets on disk: a question and a gold answer each.

A path is a JSONL file, a Parquet file, a folder that Hugging Face `datasets` saved, or a pattern such as
`data/train-*.parquet` for several files in the order of their names. GSM8K's fields are `question`, and
`answer` ending in `#### <final answer>`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from learner.errors import DataError
from learner.tokenizer import Message


class Example(msgspec.Struct, frozen=True):
    """A row of a data set."""

    row: int
    """Number of the row, from 0: the line of a file, counted on from file to file."""
    question: str | list[Message]
    """A text, or a conversation for the chat template."""
    answer: str
    """The gold answer as given."""


def load_rows(
    path: str, *, question: str = "question", answer: str = "answer", marker: str = "####"
) -> list[Example]:
    """All examples; the fields' names are `question` and `answer`, and every gold answer holds `marker`.

    Raises `DataError` naming file and row.
    """
    row_type = msgspec.defstruct(
        "Row",
        [
            ("question", str | list[Message], msgspec.field(name=question)),
            ("answer", str, msgspec.field(name=answer)),
        ],
    )
    from_json, examples, first = msgspec.json.Decoder(row_type), list[Example](), 0
    for file in _files(path):
        last = first - 1
        for number, found in _read(file, [question, answer]):
            where = f"{file}, {'line' if isinstance(found, bytes) else 'row'} {number + 1}"
            try:
                row = (
                    from_json.decode(found) if isinstance(found, bytes) else msgspec.convert(found, row_type)
                )
            except msgspec.MsgspecError as error:
                raise DataError(
                    f"{where}: {error}; expected an object with `{question}` and `{answer}`"
                ) from error
            if marker not in row.answer:
                raise DataError(
                    f"{where}: {answer}: got {row.answer[-40:]!r}, expected it to end in `{marker} <final "
                    "answer>`; or set data.answer_marker to what the gold answers hold"
                )
            last = first + number
            examples.append(Example(last, row.question, row.answer))
        first = last + 1
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return examples


def _files(path: str) -> list[Path]:
    """The files of a data set, in order."""
    folder = Path(path)
    if not folder.is_dir():
        found = [folder] if folder.is_file() else [Path(name) for name in sorted(glob.glob(path))]
        if not found:
            raise DataError(f"data.path: no file {path}; give a JSONL or Parquet file, or a saved data set")
        return found
    if (folder / "dataset_dict.json").is_file():
        splits = msgspec.json.decode((folder / "dataset_dict.json").read_bytes())["splits"]
        raise DataError(f"data.path: {path} holds several splits; give one of them: {path}/{splits[0]}")
    if not (folder / "state.json").is_file():
        raise DataError(
            f"data.path: got the folder {path}, expected one with a state.json, as `save_to_disk` "
            f"of `datasets` writes it; for a folder of files give a pattern, such as {path}/*.parquet"
        )
    state = msgspec.json.decode((folder / "state.json").read_bytes())
    return [folder / file["filename"] for file in state["_data_files"]]


def _read(file: Path, columns: list[str]) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Number and content of each row: a line of JSON, or a dictionary of those of the columns that it has."""
    if file.suffix in (".parquet", ".arrow"):
        yield from enumerate(_table(file, columns).to_pylist())
        return
    with file.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines) if line.strip())


def _table(file: Path, columns: list[str]) -> Any:
    """The columns of a Parquet file, or of an Arrow stream, as `datasets` keeps its own."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if file.suffix == ".parquet":
            schema = parquet.read_schema(file)
            return parquet.read_table(file, columns=[name for name in columns if name in schema.names])
        with pyarrow.memory_map(str(file)) as source:
            table = ipc.open_stream(source).read_all()
            return table.select([name for name in columns if name in table.column_names])
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
