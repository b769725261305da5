"""What `launch demo` does before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from buffer.local_server import LocalServer
from launch.config import load
from launch.demo import adapt_to_data, demo_file, make_room
from launch.errors import LaunchError


def test_an_earlier_run_is_moved_aside_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    for content in ("first", "second"):
        make_room(folder)
        folder.mkdir()
        (folder / "summary.json").write_text(content)
    make_room(folder)
    assert not folder.exists()
    assert [(tmp_path / f"demo-{n}" / "summary.json").read_text() for n in (1, 2)] == ["first", "second"]


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path, redis_server: LocalServer) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "redis.url").write_text(redis_server.url)
    with pytest.raises(LaunchError, match="run demo is going on"):
        make_room(folder)
    (folder / "redis.url").write_text("redis://127.0.0.1:1")
    make_room(folder)
    assert not folder.exists()


def test_somebody_elses_data_makes_a_valid_configuration() -> None:
    changes = [f"{field}={value}" for field, value in adapt_to_data("my.jsonl").items()]
    config = load([demo_file()], changes)
    assert config.data.path == "my.jsonl"
    assert config.sft is not None
    assert config.sft.demonstrate == "final"
