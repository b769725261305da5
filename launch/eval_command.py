"""The two forms of `launch eval`: a folder, and the versions of a run as they come."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from actors.errors import EngineError
from buffer.client import Stream
from buffer.connect import connect
from launch.config import load
from launch.errors import LaunchError
from launch.evaluation import Evaluation, evaluate_folder, render
from launch.evaluator import Evaluator
from launch.local import Interrupt, Progress, await_run, run_folder
from launch.subject import run_config_of


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates one folder and prints what it found."""
    folders = [Path(word) for word in args.overrides if "=" not in word]
    if len(folders) != 1:
        raise LaunchError(f"eval: got {len(folders)} folders, expected one, or --watch")
    for option, given in (("--run", args.run), ("--redis", args.redis)):
        if given:
            raise LaunchError(
                f"{option}: got one without --watch; name a folder of the run, such as its export/"
            )
    config = load(args.config, _overrides(args), run_config_of(folders[0]))
    progress, interrupt = Progress(), Interrupt()
    try:
        found = evaluate_folder(config, folders[0], show=progress.show, stop=lambda: interrupt.asked > 0)
    except EngineError as error:
        raise LaunchError(str(error)) from error
    finally:
        progress.close()
    _show(found, args.json)
    return 0


def watch(args: argparse.Namespace, url: str) -> int:
    """The evaluator beside a run, until the run is over; it waits for the run if need be."""
    from learner.kept import KEPT

    if folders := [word for word in args.overrides if "=" not in word]:
        raise LaunchError(f"eval --watch: got {folders[0]}, expected no folder: the run's own are evaluated")
    interrupt = Interrupt()
    name = args.run or await_run(url, None, interrupt)
    if name is None:
        return 0
    folder, progress = run_folder(name), Progress()
    if not (folder / "config.json").is_file():
        raise LaunchError(f"no {folder}/config.json: start the evaluator where the learner's files are")
    config = load(args.config, _overrides(args), msgspec.json.decode((folder / "config.json").read_bytes()))
    if not config.evaluation.every:
        raise LaunchError("evaluation.every: got 0, so the run keeps no version for it; set it for the run")

    def stop() -> bool:
        return interrupt.asked > 0

    def one(path: Path, skipped: list[int]) -> Evaluation:
        log = folder / "logs" / "evaluator-engine.log"
        found = evaluate_folder(config, path, log=log, show=progress.show, stop=stop, skipped=skipped)
        found = msgspec.structs.replace(found, model=str(folder / KEPT / path.name))
        progress.close()
        _show(found, args.json)
        return found

    evaluator = Evaluator(Stream(connect(url), name), folder, config.evaluation.every, one)
    evaluator.run(stop)
    return 0


def _overrides(args: argparse.Namespace) -> list[str]:
    """Options, as the settings they stand for, and the settings given as such, which win."""
    chosen = {"data": args.data, "samples": args.samples, "sampling.temperature": args.temperature}
    given = [f"evaluation.{field}={value}" for field, value in chosen.items() if value is not None]
    return [*given, *(word for word in args.overrides if "=" in word)]


def _show(found: Evaluation, as_json: bool) -> None:
    print(msgspec.json.encode(found).decode() if as_json else render(found), flush=True)
