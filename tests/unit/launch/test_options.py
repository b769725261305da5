"""The command line is frozen: a change of options is a change of this list, made on purpose."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from launch.cli import build_parser, main

RUN = ["--config", "--dry-run", "--json"]
OPTIONS = {
    "demo": [*RUN, "--data", "--name", "--seed", "--actors", "--family", "--record"],
    "learner": [*RUN, "--redis", "--nodes", "--nproc-per-node", "--node", "--meet", "--fork"],
    "actors": ["--count", "--run", "--redis"],
    "scale": ["--run", "--redis"],
    "redis": ["--port", "--folder", "--users"],
    "redis-users": ["--run", "--redis"],
    "doctor": ["--run", "--json", "--redis"],
    "sft": [*RUN, "--out"],
    "data": ["--out", "--seed", "--reasoning-gym", "--size", "--verifiers", "--arguments"],
    "model": ["--out", "--family", "--seed"],
    "convert": ["--like", "--out"],
    "eval": ["--config", "--data", "--samples", "--temperature", "--json", "--watch", "--run", "--redis"],
    "status": ["--run", "--redis", "--json"],
    "stop": ["--run", "--redis"],
    "verify": ["--run", "--redis", "--json", "--weights", "--samples"],
    "inspect": ["--run", "--redis", "--json", "--dead", "--out", "--requeue"],
    "record": ["--run", "--redis", "--out", "--weights"],
    "replay": ["--steps", "--weights", "--json"],
}


def options() -> dict[str, list[str]]:
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: [
            flag
            for action in parser._actions
            for flag in action.option_strings
            if flag not in ("-h", "--help")
        ]
        for name, parser in subparsers.choices.items()
    }


def test_the_options_are_these() -> None:
    assert {name: sorted(flags) for name, flags in options().items()} == {
        name: sorted(flags) for name, flags in OPTIONS.items()
    }


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["status", "--redis", "redis://127.0.0.1:1"], "no Redis at redis://127.0.0.1:1"),
        (["status", "--redis", "http://x"], "expected redis://"),
        (["doctor", "--redis", "redis://127.0.0.1:1"], "no Redis at redis://127.0.0.1:1"),
        (["redis-users", "--redis", "redis://127.0.0.1:1"], "no Redis at redis://127.0.0.1:1"),
        (["stop", "--redis", "redis://:secret@127.0.0.1:1"], "no Redis at redis://:***@127.0.0.1:1"),
        (["actors", "--count", "0", "--redis", "redis://127.0.0.1:1"], "--count: got 0, expected 1 or more"),
        (["learner", "model.path=m", "--redis", "redis://127.0.0.1:1"], "missing required field `data`"),
        (["demo", "--dry-run", "stream.eta=1"], "unknown field `eta`"),
        (["learner", "--fork", "x"], "--fork: got x, expected the version of a checkpoint, or newest"),
        (["learner", "--nodes", "0"], "--nodes / --nproc-per-node: got 0 / 1, expected 1 or more"),
        (["learner", "--nodes", "2", "--node", "2"], "--node: got 2, expected 0 to 1 with --nodes 2"),
        (["learner", "--nodes", "2", "--node", "1"], "--meet: got '' with --node, expected HOST:PORT"),
        (["learner", "--nodes", "2", "--meet", "a:1"], "--meet: got 'a:1' without --node"),
        (["convert", "mcore-to-hf", "a", "--out", "b"], "--like: got None, expected the Hugging Face folder"),
        (
            ["convert", "hf-to-mcore", "a", "--out", "b", "--like", "c"],
            "--like: got c, expected no such option",
        ),
        (["eval"], "eval: got 0 folders, expected one, or --watch"),
        (["eval", "no-such"], "no-such has no config.json and no .metadata, expected a Hugging Face"),
        (["eval", "x", "evaluation.sampling.top_k=0"], "top_k: got 0, expected 1 or more, or -1 for all"),
        (["eval", "x", "--samples", "0"], "evaluation.samples: Expected `int` >= 1"),
        (["eval", "--run", "r", "x"], "--run: got one without --watch"),
        (["demo", "--family", "llama"], "--family: got 'llama', expected qwen3, qwen3_moe"),
        (["data", "--out", "d", "--size", "5"], "--size: got 5 without --reasoning-gym, expected no such"),
        (["data", "--out", "d", "--arguments", "{}"], "--arguments: got {} without --verifiers, expected no"),
        (
            ["data", "--out", "d", "--verifiers", "a:b", "--arguments", "[1]"],
            "--arguments: got [1]: Expected `object`, got `array`; expected an object in JSON",
        ),
        (
            ["data", "--out", "d", "--verifiers", "a:b", "--reasoning-gym", "t"],
            "--reasoning-gym and --verifiers: expected one of them",
        ),
        (
            ["data", "--out", "d", "--verifiers", "a:b", "--seed", "1"],
            "--seed: got 1 with --verifiers, whose data are the environment's own",
        ),
        (["demo", "redis.url=redis://:secret@h:1"], "redis.url: got redis://:***@h:1, but the demo starts"),
        (["demo", "--family", "qwen3", "model.path=m"], "--family: got qwen3 with model.path m, so none is"),
        (["verify", "--samples", "3"], "--samples: got 3 without --weights, expected no such option"),
        (["inspect", "--requeue", "1-1", "--json"], "--requeue: got one with --dead, --out or --json"),
        (["model", "--out", "m", "--family", "llama"], "--family: got 'llama', expected qwen3, qwen3_moe"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_nothing_heavy_is_imported_for_help_and_status() -> None:
    heavy = "torch,numpy,sglang,megatron,transformers,matplotlib,tokenizers"
    code = (
        "import sys, launch.cli, launch.commands, launch.status; launch.cli.build_parser();"
        f"print([m for m in '{heavy}'.split(',') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
