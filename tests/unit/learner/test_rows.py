"""Data sets in every format that is read: the same rows come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from learner.errors import DataError
from learner.rows import Example, load_rows

ROWS = [{"question": f"{n} + 1 = ?", "answer": f"#### {n + 1}", "level": n} for n in range(5)]
EXAMPLES = [Example(n, row["question"], row["answer"]) for n, row in enumerate(ROWS)]


def saved(folder: Path, *parts: list[dict[str, Any]]) -> Path:
    """A folder as `Dataset.save_to_disk` of `datasets` 5 writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    return folder


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    folder = saved(tmp_path / "saved", ROWS[:2], ROWS[2:])
    for path in (lines, tmp_path / "rows.parquet", folder):
        assert load_rows(str(path)) == EXAMPLES


def test_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, rows in (("train-1", ROWS[3:]), ("train-0", ROWS[:3]), ("test-0", ROWS)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert load_rows(f"{tmp_path}/train-*.parquet") == EXAMPLES


def test_a_conversation_is_read_from_a_table(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1 + 1"}], "gold": "2"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    (example,) = load_rows(str(tmp_path / "chat.parquet"), question="prompt", answer="gold", marker="")
    assert example.question[0].content == "1 + 1"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet, row 1: .*`problem`.*; expected an object with"):
        load_rows(str(tmp_path / "rows.parquet"), question="problem")
    parquet.write_table(
        pyarrow.Table.from_pylist([ROWS[0], {**ROWS[1], "answer": None}]), tmp_path / "null.parquet"
    )
    with pytest.raises(DataError, match=r"null.parquet, row 2: Expected `str`, got `null` - at `\$.answer`"):
        load_rows(str(tmp_path / "null.parquet"))
    with pytest.raises(DataError, match=r"row 1: answer: got '#### 1', expected it to end in `\\boxed"):
        load_rows(str(tmp_path / "rows.parquet"), marker="\\boxed{")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"broken.parquet: cannot be read: .*Parquet"):
        load_rows(str(tmp_path / "broken.parquet"))
    with pytest.raises(DataError, match=r"no file .*none-\*.parquet; give"):
        load_rows(f"{tmp_path}/none-*.parquet")


def test_a_folder_that_is_no_data_set_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one with a state.json.*/\*.parquet"):
        load_rows(str(tmp_path))
    saved(tmp_path / "splits" / "train", ROWS)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits; give one of them: .*/splits/train"):
        load_rows(str(tmp_path / "splits"))
    assert load_rows(str(tmp_path / "splits" / "train")) == EXAMPLES
