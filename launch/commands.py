"""What each command of `launch` does. Imports stay inside, so that `launch status` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError

if TYPE_CHECKING:
    from launch.config import RunConfig
    from launch.summary import Summary


def demo(args: argparse.Namespace) -> int:
    """The whole system on this machine."""
    from buffer.connect import shown
    from launch.demo import adapt_to_data, demo_file, run_demo

    chosen = {"name": args.name, "seed": args.seed}
    if args.data:
        chosen |= adapt_to_data(args.data)
    overrides = [f"{field}={value}" for field, value in chosen.items() if value is not None]
    config = _config(args, [demo_file()], overrides)
    if config is None:
        return 0
    if config.redis.url:
        raise LaunchError(
            f"redis.url: got {shown(config.redis.url)}, but the demo starts a server of its own; use "
            "`launch learner` and `launch actors` on that one"
        )
    if args.family and config.model.path:
        raise LaunchError(f"--family: got {args.family} with model.path {config.model.path}, so none is made")
    family = args.family or "qwen3_next"
    return _finish(run_demo(config, args.actors, family=family, record=args.record), args.json)


def learner(args: argparse.Namespace) -> int:
    """Trains a run on a Redis that is there."""
    from buffer.client import Stream
    from launch.local import (
        EvaluatorChild,
        Interrupt,
        follow,
        follow_node,
        run_folder,
        start_learner,
    )
    from launch.nodes import Nodes
    from launch.summary import conclude
    from launch.supervise import Supervisor

    nodes = Nodes(args.nodes, args.nproc_per_node, args.node, args.meet)
    nodes.check()
    fork = None if args.fork is None else _version(args.fork)
    config = _config(args, [], [])
    if config is None:
        return 0
    url, began, interrupt = _url(args, config.redis.url), time.monotonic(), Interrupt()
    stream = Stream.connect(url, config.name)
    with Supervisor() as children:
        ranks = start_learner(children, config, url, run_folder(config.name), nodes, fork)
        if not nodes.leads:
            follow_node(ranks, interrupt)
            return 0
        evaluator = EvaluatorChild(children, config, url)
        ledger = follow(stream, ranks, None, interrupt, evaluator)
        evaluator.finish(interrupt)
    return _finish(conclude(config, ledger, time.monotonic() - began), args.json)


def _version(text: str) -> int:
    """A version, -1 for the newest one. Raises `LaunchError`."""
    if text == "newest":
        return -1
    if not text.isdecimal():
        raise LaunchError(f"--fork: got {text}, expected the version of a checkpoint, or newest")
    return int(text)


def actors(args: argparse.Namespace) -> int:
    """Generates for a run, waiting for it if need be, until it ends."""
    from launch.local import Interrupt, run_actors

    if args.count < 1:
        raise LaunchError(f"--count: got {args.count}, expected 1 or more")
    return run_actors(_url(args, ""), args.run, args.count, Interrupt())


def scale(args: argparse.Namespace) -> int:
    """Another number of actors in mid-run, shared out among the launchers that are alive."""
    from launch.fleet import Launcher, scale
    from launch.local import Progress
    from launch.status import find_run

    if args.count < 0:
        raise LaunchError(f"scale actors: got {args.count}, expected 0 or more")
    progress = Progress()

    def show(found: dict[str, Launcher]) -> None:
        running, draining = (
            sum(getattr(one, what) for one in found.values()) for what in ("running", "draining")
        )
        progress.show(f"{running} actors, {draining} draining")

    found = scale(find_run(_url(args, ""), args.run, ended=False), args.count, show)
    progress.close()
    print("\n".join(f"{name}: {launcher.running} actors" for name, launcher in found.items()))
    return 0


def redis(args: argparse.Namespace) -> int:
    """A private Redis until Ctrl-C."""
    from contextlib import ExitStack

    from buffer.local_server import LocalServer, url_file
    from launch.local import Interrupt

    interrupt = Interrupt()
    with LocalServer.start(args.folder, port=args.port, users=args.users) as server, ExitStack() as files:
        files.enter_context(url_file(args.folder, server.url))
        print(server.url, flush=True)
        for role, url in server.urls.items():
            path = files.enter_context(url_file(args.folder, url, role))
            print(f"{role}: {url}  (in {path})", flush=True)
        print(f"data in {args.folder}; end it with Ctrl-C", file=sys.stderr)
        while not interrupt.asked and server.process.poll() is None:
            time.sleep(0.2)
    return 0


def redis_users(args: argparse.Namespace) -> int:
    """Users on a Redis that is there, one a role; prints the URLs of those that are new."""
    from buffer.acl import ROLES, create_users, keep_users, user_name, with_user
    from buffer.connect import connect

    url, run = _url(args, ""), args.run or ""
    client = connect(url)
    created = create_users(client, run)
    for role in ROLES:
        name = user_name(role, run)
        if name in created:
            print(f"{name}: {with_user(url, name, created[name])}")
        else:
            print(f"{name} was there: its rights are renewed, its password is kept", file=sys.stderr)
    if not keep_users(client):
        print(
            "the server has no aclfile and forgets its users when it restarts: name one in its configuration",
            file=sys.stderr,
        )
    client.close()
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Looks at how a Redis is set up; 1 if anything is wrong."""
    import msgspec

    from launch.doctor import examine, render

    findings = examine(_url(args, ""), args.run)
    print(msgspec.json.encode(findings).decode() if args.json else render(findings))
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0


def sft(args: argparse.Namespace) -> int:
    """A supervised warm-up; its progress goes to standard error."""
    import subprocess
    import tempfile

    import msgspec

    from launch.config import to_json
    from learner.config import SftConfig

    config = _config(args, [], [])
    if config is None:
        return 0
    if config.sft is None:
        config = msgspec.structs.replace(config, sft=SftConfig())
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(to_json(config))
        file.flush()
        argv = [sys.executable, "-m", "learner.warmup", "--config", file.name, "--out", str(args.out)]
        return subprocess.run(argv, check=False).returncode


def data(args: argparse.Namespace) -> int:
    """Arithmetic questions in GSM8K's schema, those of a task of reasoning-gym, or an environment's own."""
    from launch.arithmetic import write_arithmetic
    from launch.reasoning import write_reasoning
    from launch.verifiers import arguments_of, write_verifiers

    if args.size is not None and not args.reasoning_gym:
        raise LaunchError(f"--size: got {args.size} without --reasoning-gym, expected no such option")
    if args.arguments is not None and not args.verifiers:
        raise LaunchError(f"--arguments: got {args.arguments} without --verifiers, expected no such option")
    if args.seed is not None and args.verifiers:
        raise LaunchError(f"--seed: got {args.seed} with --verifiers, whose data are the environment's own")
    if args.reasoning_gym and args.verifiers:
        raise LaunchError("--reasoning-gym and --verifiers: expected one of them")
    paths: tuple[Path, ...]
    seed = args.seed or 0
    if args.verifiers:
        paths = write_verifiers(args.verifiers, args.out, arguments=arguments_of(args.arguments or "{}"))
    elif args.reasoning_gym:
        size = 1000 if args.size is None else args.size
        paths = write_reasoning(args.reasoning_gym, args.out, size=size, seed=seed)
    else:
        paths = write_arithmetic(args.out, seed=seed)
    for path in paths:
        print(path)
    return 0


def model(args: argparse.Namespace) -> int:
    """A tiny checkpoint with random weights."""
    from launch.tiny_model import FAMILIES, make_tiny

    if args.family not in FAMILIES:
        raise LaunchError(f"--family: got {args.family!r}, expected {', '.join(FAMILIES)}")
    print(make_tiny(args.family, args.out, seed=args.seed))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Converts a checkpoint folder; its progress goes to standard error."""
    import subprocess

    back = args.direction == "mcore-to-hf"
    if back != (args.like is not None):
        expected = "the Hugging Face folder the model came from" if back else "no such option"
        raise LaunchError(f"--like: got {args.like}, expected {expected} with {args.direction}")
    like = ["--like", str(args.like)] if back else []
    # Megatron-Core warns of every library that a CPU does without.
    python = [sys.executable, "-W", "ignore", "-m", "learner.convert"]
    argv = [*python, args.direction, str(args.source), "--out", str(args.out), *like]
    return subprocess.run(argv, check=False).returncode


def status(args: argparse.Namespace) -> int:
    """A run as Redis knows it."""
    import msgspec

    from launch.status import find_run, read_status, render

    found = read_status(find_run(_url(args, ""), args.run))
    print(msgspec.json.encode(found).decode() if args.json else render(found))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates a folder, or with --watch the versions of a run as they come."""
    from launch.eval_command import evaluate, watch

    return watch(args, _url(args, "")) if args.watch else evaluate(args)


def verify(args: argparse.Namespace) -> int:
    """Proves the invariants of a run from one snapshot, and its weights from the engines; 1 if any fails."""
    import msgspec

    from launch.status import find_run
    from launch.verify import render, verify

    if args.samples is not None and not args.weights:
        raise LaunchError(f"--samples: got {args.samples} without --weights, expected no such option")
    samples = 8 if args.samples is None else args.samples
    if samples < 1:
        raise LaunchError(f"--samples: got {samples}, expected 1 or more")
    stream = find_run(_url(args, ""), args.run)
    found, checks = verify(stream), None
    if args.weights:
        from launch import weights  # brings numpy

        checks = weights.check_weights(stream, samples)
    if args.json:
        print(msgspec.json.encode({**msgspec.to_builtins(found), "weights": checks}).decode())
    else:
        print("\n".join([*([weights.render(checks)] if checks else []), render(found)]))
    return 0 if found.holds and (checks is None or checks.hold) else 1


def inspect(args: argparse.Namespace) -> int:
    """Dead letters: lists them, saves their payloads, or puts one's prompt back."""
    import msgspec

    from launch.inspect import dead_letters, render, requeue, save_payloads
    from launch.status import find_run

    if not (args.dead or args.requeue):
        raise LaunchError("nothing to inspect: give --dead, or --requeue ENTRY")
    if args.requeue and (args.dead or args.out or args.json):
        raise LaunchError(
            "--requeue: got one with --dead, --out or --json, which are for listing; give it alone"
        )
    stream = find_run(_url(args, ""), args.run)
    if args.requeue:
        print(f"the prompt at position {requeue(stream, args.requeue)} waits in the queue again")
        return 0
    letters = dead_letters(stream)
    for path in save_payloads(letters, args.out) if args.out else []:
        print(path, file=sys.stderr)
    print(msgspec.json.encode([letter for letter, _ in letters]).decode() if args.json else render(letters))
    return 0


def record(args: argparse.Namespace) -> int:
    """Keeps all that a run consumes, waiting for it if need be, until it ends."""
    from buffer.client import Stream
    from buffer.connect import connect
    from launch.local import Interrupt, await_run
    from launch.record import record_run

    url, interrupt = _url(args, ""), Interrupt()
    name = await_run(url, args.run, interrupt)
    if name is None:
        return 0
    steps = record_run(Stream(connect(url), name), args.out, args.weights, interrupt)
    print(f"{steps} steps of run {name} in {args.out}; `launch replay {args.out}` trains them again")
    return 0


def replay(args: argparse.Namespace) -> int:
    """Trains a record again in a process of its own, as the learner did."""
    import subprocess

    from launch.local import process_environment

    argv = [sys.executable, "-W", "ignore", "-m", "learner.replay", str(args.folder)]
    argv += [f"--steps={args.steps}"] if args.steps is not None else []
    argv += [f"--weights={args.weights}"] if args.weights else []
    argv += ["--json"] if args.json else []
    environment = {**os.environ, **process_environment("")}
    return subprocess.run(argv, env=environment, check=False).returncode


def stop(args: argparse.Namespace) -> int:
    """Ends a run after the step under way, and waits until learner and actors have left."""
    from launch.local import stop_run
    from launch.status import find_run

    stop_run(find_run(_url(args, ""), args.run))
    return 0


def _config(args: argparse.Namespace, files: list[Path], overrides: list[str]) -> RunConfig | None:
    """The resolved configuration; None if it was only to be shown."""
    from launch.config import load, to_json

    config = load([*files, *args.config], [*overrides, *args.overrides])
    if args.dry_run:
        print(to_json(config).decode())
        return None
    return config


def _url(args: argparse.Namespace, configured: str) -> str:
    """The server's URL: option, configuration, environment, or the newest local one."""
    named = args.redis if hasattr(args, "redis") and args.redis else configured
    if named or os.environ.get("SLIPSTREAM_REDIS"):
        return named or os.environ["SLIPSTREAM_REDIS"]
    files = sorted(Path("runs").glob("*/redis.url"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise LaunchError(
            "no Redis: give --redis URL, set SLIPSTREAM_REDIS, or start one with `launch redis`"
        )
    return files[-1].read_text().strip()


def _finish(summary: Summary | None, as_json: bool) -> int:
    """Prints the summary, as a page or as the last line; 1 if the ledger does not add up."""
    import msgspec

    from launch.summary import render

    if summary is None:
        print("stopped before the run began", file=sys.stderr)
        return 1
    print(msgspec.json.encode(summary).decode() if as_json else render(summary))
    return 0 if summary.conserved else 1
