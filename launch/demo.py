"""`launch demo`: the whole system on one machine, from a random model to a trained one."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from importlib.resources import files
from pathlib import Path

import msgspec

from buffer.client import Stream
from buffer.connect import connect
from buffer.errors import RedisUnavailable
from buffer.local_server import LocalServer, url_file
from launch.arithmetic import write_arithmetic
from launch.config import RunConfig
from launch.errors import LaunchError
from launch.fleet import Fleet
from launch.local import (
    EvaluatorChild,
    Interrupt,
    follow,
    run_folder,
    start_learner,
    start_recorder,
)
from launch.nodes import Nodes
from launch.summary import Summary, conclude
from launch.supervise import Supervisor
from launch.tiny_model import FAMILIES, make_tiny

_RECORD_S = 60.0
"""How long the recorder may take for the last steps after the run has ended."""


def prepare(config: RunConfig, family: str) -> RunConfig:
    """Makes the demo's model, of one of `FAMILIES`, and its data set, unless they are set; the
    configuration with both."""
    folder = run_folder(config.name)
    model, data = config.model, config.data
    if not model.path:
        made = make_tiny(family, folder / "model", seed=config.seed)
        model = msgspec.structs.replace(model, path=str(made))
    if not (data.path or data.sources):
        made_data = write_arithmetic(folder / "data", seed=config.seed)
        data = msgspec.structs.replace(
            data,
            path=str(made_data.train),
            held_out=str(made_data.held_out),
            demonstrations=str(made_data.demonstrations),
        )
    return msgspec.structs.replace(config, model=model, data=data)


def run_demo(
    config: RunConfig, actors: int, *, family: str = "qwen3_next", record: bool = False
) -> Summary | None:
    """Runs to the end, or to Ctrl-C; the summary, None if the run was stopped before it began.

    `family` is that of the model that is made. With `record`, all that the run consumes is kept in
    `record` of its folder.

    Raises `LaunchError`, `StreamError`.
    """
    if actors < 1:
        raise LaunchError(f"--actors: got {actors}, expected 1 or more")
    if family not in FAMILIES:
        raise LaunchError(f"--family: got {family!r}, expected {', '.join(FAMILIES)}")
    began, interrupt, redis = time.monotonic(), Interrupt(), config.redis
    folder = run_folder(config.name)
    make_room(folder)
    config = prepare(config, family)
    with (
        LocalServer.start(folder / "redis", port=redis.port, appendfsync=redis.appendfsync) as server,
        url_file(folder, server.url) as url,
        Supervisor() as children,
    ):
        print(f"run {config.name}: files in {folder}, Redis URL in {url}", file=sys.stderr)
        stream = Stream.connect(server.socket_url, config.name)
        recorder = start_recorder(children, config.name, server.socket_url, folder) if record else None
        learner = start_learner(children, config, server.socket_url, folder, Nodes())
        fleet = Fleet(children, stream, server.socket_url, folder / "logs", actors)
        evaluator = EvaluatorChild(children, config, server.socket_url)
        ledger = follow(stream, learner, fleet, interrupt, evaluator)
        fleet.stop()
        evaluator.finish(interrupt)
        if recorder is not None:
            recorder.process.wait(_RECORD_S)
            print(recorder.last_words(), file=sys.stderr)
    return conclude(config, ledger, time.monotonic() - began)


def make_room(folder: Path) -> None:
    """Moves what an earlier run left in `folder` aside. Raises `LaunchError` if that run goes on."""
    if (folder / "redis.url").exists():
        with contextlib.suppress(RedisUnavailable):
            connect((folder / "redis.url").read_text().strip()).close()
            raise LaunchError(
                f"run {folder.name} is going on; end it with `launch stop`, or choose another --name"
            )
    if folder.exists():
        aside = next(
            path
            for number in itertools.count(1)
            if not (path := folder.with_name(f"{folder.name}-{number}")).exists()
        )
        folder.rename(aside)
        print(f"the earlier run is kept in {aside}", file=sys.stderr)


def demo_file() -> Path:
    """The demo's configuration."""
    return Path(str(files("launch").joinpath("demo.toml")))


def adapt_to_data(path: str) -> dict[str, str]:
    """What changes when the demo's tiny model is asked somebody's own questions, such as GSM8K's.

    It cannot learn the reasoning, so it is shown, and asked for, final answers only; the warm-up ends
    after a number of steps, since the accuracy it stops at otherwise is out of reach.
    """
    return {
        "data.path": path,
        "sft.demonstrate": "final",
        "sft.batch": "32",
        "sft.max_steps": "60",
    }
