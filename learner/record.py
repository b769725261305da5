"""What a run leaves behind as it goes: a line a step, and the spans of generation and training."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from buffer.client import Stream
from buffer.schema import Group
from learner.board import Board

START = Path("weights", "0")
"""Where, in a run's folder, version 0 lies if the run made it itself by a warm-up."""
_PACKAGES = ("slipstream", "torch", "megatron-core", "numpy", "transformers", "safetensors")


def environment() -> dict[str, str]:
    """What a replay must share to be bitwise: package versions, instruction set, threads, layout."""
    import torch

    from learner.model.world import described

    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "layout": described(),
    }


class RunRecord:
    """Writes `metrics.jsonl`, `timeline.jsonl` and the hash `{run}:progress`.

    A line of the timeline is ``{"lane": "learner", "kind": "train", "step": 3, "start": s, "end": s}`` or
    ``{"lane": "actor-0", "kind": "generate", "group": "...", "start": s, "end": s}``, in seconds since 1970.
    """

    def __init__(self, folder: Path, stream: Stream, *, going_on: bool = False) -> None:
        """`going_on`: adds to what a run that was cut off left in `folder`; else begins anew."""
        folder.mkdir(parents=True, exist_ok=True)
        self._board = Board(stream)
        mode = "a+b" if going_on else "w+b"
        self._metrics = (folder / "metrics.jsonl").open(mode)
        self._timeline = (folder / "timeline.jsonl").open(mode)

    def rewind(self, step: int) -> None:
        """Drops the metrics of this step and later ones, which will be trained again, and lines cut off."""
        _keep(self._metrics, lambda line: line["step"] < step)
        _keep(self._timeline, lambda line: True)

    def step(self, metrics: dict[str, Any]) -> None:
        """Records a step's metrics; readers of Redis see the newest."""
        self._metrics.write(msgspec.json.encode(metrics) + b"\n")
        self._metrics.flush()
        self.progress({name: _short(value) for name, value in metrics.items() if not isinstance(value, dict)})

    def progress(self, figures: dict[str, Any]) -> None:
        """Shows figures in `{run}:progress`, soon; a Redis that is away costs only the display."""
        self._board.show(figures)

    def trained(self, step: int, start: float, end: float) -> None:
        """Records the span in which the learner trained a step."""
        self._span({"lane": "learner", "kind": "train", "step": step, "start": start, "end": end})

    def generated(self, groups: list[Group]) -> None:
        """Records the spans in which actors generated the groups of a step."""
        for group in groups:
            span = {"lane": group.actor, "kind": "generate", "group": group.id}
            self._span({**span, "start": group.started, "end": group.finished})

    def _span(self, span: dict[str, Any]) -> None:
        self._timeline.write(msgspec.json.encode(span) + b"\n")

    def __enter__(self) -> RunRecord:
        self._board.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.__exit__(kind, error, trace)
        self._metrics.close()
        self._timeline.close()


def _short(value: Any) -> Any:
    return "nan" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _keep(file: BinaryIO, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps the wanted lines of a file that was opened to append."""
    file.seek(0)
    lines, _, _ = file.read().rpartition(b"\n")
    kept = [line for line in lines.splitlines() if wanted(msgspec.json.decode(line))]
    file.truncate(0)
    file.write(b"".join(line + b"\n" for line in kept))
    file.flush()
