"""The command `launch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from buffer.errors import StreamError
from launch import commands
from launch.errors import LaunchError


def build_parser() -> argparse.ArgumentParser:
    """All commands and options; `tests/unit/launch/test_options.py` freezes them."""
    parser = argparse.ArgumentParser(
        prog="launch", description="Slipstream: asynchronous GRPO with a proven staleness bound."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(
        subparsers, "demo", commands.demo, "the whole system on this machine, from a random model"
    )
    _run_options(demo)
    demo.add_argument("--data", metavar="FILE", help="questions to train on: JSONL in GSM8K's schema")
    demo.add_argument("--name", help="name of the run (default: demo)")
    demo.add_argument("--seed", type=int, help="seed of model, data and samples (default: 0)")
    demo.add_argument("--family", help="of the model that is made: qwen3_next (default), qwen3 or qwen3_moe")
    demo.add_argument("--record", action="store_true", help="keep all it consumes in runs/<name>/record")
    demo.add_argument("--actors", type=int, default=2, metavar="N", help="actors to start (default: 2)")

    learner = _command(subparsers, "learner", commands.learner, "train a run; needs a Redis")
    _run_options(learner)
    _redis_option(learner)
    learner.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="node groups of processes (default: 1)"
    )
    learner.add_argument(
        "--nproc-per-node", type=int, default=1, metavar="K", help="processes a node (default: 1)"
    )
    learner.add_argument(
        "--node", type=int, metavar="I", help="this machine is node I, 0 the first (default: it is all nodes)"
    )
    learner.add_argument("--meet", default="", metavar="HOST:PORT", help="with --node: where node 0 listens")
    learner.add_argument(
        "--fork",
        metavar="VERSION",
        help="go on from the checkpoint of this version, or from the `newest`, in a new lineage: later steps "
        "are undone, and rules such as stream.max_steps may change",
    )

    actors = _command(
        subparsers, "actors", commands.actors, "generate for a run; needs nothing but the Redis URL"
    )
    actors.add_argument("--count", type=int, default=1, metavar="N", help="actors to start (default: 1)")
    actors.add_argument("--run", help="name of the run (default: the only one)")
    _redis_option(actors)

    scale = _command(subparsers, "scale", commands.scale, "run more or fewer actors while it trains")
    scale.add_argument("what", choices=("actors",))
    scale.add_argument("count", type=int, metavar="N", help="how many actors all launchers run together")
    scale.add_argument("--run", help="name of the run (default: the only one)")
    _redis_option(scale)

    redis = _command(subparsers, "redis", commands.redis, "a private Redis on this machine, until Ctrl-C")
    redis.add_argument("--port", type=int, default=0, help="loopback port (default: any free one)")
    redis.add_argument("--folder", type=Path, default=Path("runs/redis"), help="where it keeps its data")
    redis.add_argument("--users", action="store_true", help="a user for each role; writes <role>.url files")

    users = _command(
        subparsers, "redis-users", commands.redis_users, "make a user for each role on a Redis that is there"
    )
    users.add_argument("--run", help="users of this run only (default: of all runs)")
    _redis_option(users)

    doctor = _command(subparsers, "doctor", commands.doctor, "look at how a Redis is set up; 1 if wrong")
    doctor.add_argument("--run", help="look at the payload limit of this run only")
    doctor.add_argument("--json", action="store_true", help="print one JSON array")
    _redis_option(doctor)

    sft = _command(subparsers, "sft", commands.sft, "supervised warm-up on a data set's own answers")
    _run_options(sft)
    sft.add_argument("--out", type=Path, required=True, help="folder for the trained checkpoint")

    data = _command(subparsers, "data", commands.data, "write arithmetic questions, or a package's")
    data.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and held_out.jsonl")
    data.add_argument("--seed", type=int, help="seed of the questions (default: 0)")
    data.add_argument("--reasoning-gym", metavar="TASK", help="questions of this task instead of arithmetic")
    data.add_argument("--size", type=int, help="how many of them to generate (default: 1000)")
    data.add_argument("--verifiers", metavar="MODULE:FUNCTION", help="data of the environment that it makes")
    data.add_argument("--arguments", metavar="JSON", help="an object: keyword arguments of the function")

    model = _command(subparsers, "model", commands.model, "make a tiny checkpoint with random weights")
    model.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    model.add_argument("--family", default="qwen3", help="qwen3 (default), qwen3_moe or qwen3_next")
    model.add_argument("--seed", type=int, default=0, help="seed of its weights (default: 0)")

    convert = _command(
        subparsers, "convert", commands.convert, "a checkpoint from Hugging Face to Megatron-Core or back"
    )
    convert.add_argument("direction", choices=("hf-to-mcore", "mcore-to-hf"))
    convert.add_argument("source", type=Path, help="folder to convert")
    convert.add_argument(
        "--out", type=Path, required=True, help="folder for the result; goes on if interrupted"
    )
    convert.add_argument(
        "--like", type=Path, metavar="FOLDER", help="mcore-to-hf: checkpoint to take config and dtypes from"
    )

    evaluate = _command(subparsers, "eval", commands.evaluate, "ask a model questions: mean@k and pass@k")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="FOLDER | section.field=value",
        help="a folder, such as runs/NAME/export, runs/NAME/weights/20 or a checkpoint; settings",
    )
    evaluate.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE", help="TOML file; later ones win"
    )
    evaluate.add_argument("--data", metavar="FILE", help="questions (default: the run's held-out ones)")
    evaluate.add_argument("--samples", type=int, metavar="K", help="answers to each (default: 8)")
    evaluate.add_argument("--temperature", type=float, metavar="T", help="0: greedy (default: 0.6)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object, last line")
    evaluate.add_argument("--watch", action="store_true", help="evaluate the versions of a run as they come")
    evaluate.add_argument("--run", help="with --watch: name of the run (default: the only one)")
    _redis_option(evaluate)

    status = _command(subparsers, "status", commands.status, "a run as Redis knows it")
    verify = _command(
        subparsers, "verify", commands.verify, "prove that nothing is lost, trained twice or too old"
    )
    inspect = _command(subparsers, "inspect", commands.inspect, "dead letters: list, save, put back")
    record = _command(subparsers, "record", commands.record, "keep all that a run consumes, for a replay")
    stop = _command(subparsers, "stop", commands.stop, "end a run after the step under way")
    for command in (status, verify, inspect, record, stop):
        command.add_argument("--run", help="name of the run (default: the only one)")
        _redis_option(command)
    for command in (status, verify, inspect):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    verify.add_argument(
        "--weights", action="store_true", help="also score recent samples again, by engines and kept versions"
    )
    verify.add_argument("--samples", type=int, metavar="K", help="how many of them (default: 8)")
    inspect.add_argument("--dead", action="store_true", help="list the dead letters")
    inspect.add_argument("--out", type=Path, metavar="DIR", help="also save their payloads there")
    inspect.add_argument("--requeue", metavar="ENTRY", help="put the prompt of a letter back into the queue")
    record.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the record")
    record.add_argument(
        "--weights", type=Path, metavar="DIR", help="checkpoint that step 0 trains from (default: the run's)"
    )

    replay = _command(subparsers, "replay", commands.replay, "train a record again and compare every digest")
    replay.add_argument("folder", type=Path, metavar="DIR", help="a folder that `launch record` made")
    replay.add_argument("--steps", type=int, metavar="N", help="only the first N steps")
    replay.add_argument(
        "--weights", type=Path, metavar="DIR", help="checkpoint to start from (default: the record's)"
    )
    replay.add_argument("--json", action="store_true", help="print one JSON object, last line")
    return parser


def _command(subparsers: Any, name: str, function: Callable[..., int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=text)
    parser.set_defaults(function=function)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE", help="TOML file; later ones win"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object, last line")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="such as optimizer.lr=1e-4"
    )


def _redis_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="URL of the Redis (default: SLIPSTREAM_REDIS, else the newest runs/*/redis.url)",
    )


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Overrides may stand before, between and behind options, which argparse cannot say."""
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides") or any(word.startswith("-") for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return args
    args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors of ours are one line on standard error and exit code 2."""
    args = _parse(build_parser(), argv)
    try:
        return args.function(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (LaunchError, StreamError) as error:
        print(f"launch {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
