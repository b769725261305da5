"""How well the weights in a folder answer, by an SGLang engine of its own.

The engine loads the folder once and gets no other weights, so every answer is that version's.
"""

from __future__ import annotations

import asyncio
import collections
import os
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from actors.config import Sampling
from actors.errors import EngineError
from actors.evaluation import Asked, Figures
from launch.config import RunConfig
from launch.errors import LaunchError

if TYPE_CHECKING:
    from buffer.schema import Prompt

_LOOK_S = 0.2
_BAR = 24
"""Characters of the progress bar."""

Show = Callable[[str], None]


class Evaluation(Figures, frozen=True, kw_only=True):
    """What an evaluation found, of what, and how it asked."""

    model: str
    """The folder."""
    version: int | None
    """Of the run; null if the folder is neither a kept version nor a checkpoint of a run."""
    digest: str
    """Of the version; empty if there is none."""
    lineage: int | None
    """Of the run when the version was made."""
    data: str
    """The file of the questions."""
    threshold: float
    """An answer whose reward is at least this has passed."""
    sampling: Sampling
    """How answers were drawn."""
    seed: int
    """Of the run, on which the draws depend."""
    skipped: list[int]
    """Versions that were to be evaluated before this one, and came while another was."""
    time: float
    """When it began, seconds since 1970."""
    seconds: float
    """It took, start of the engine included."""


def evaluate_folder(
    config: RunConfig,
    folder: Path,
    *,
    log: Path | None = None,
    show: Show,
    stop: Callable[[], bool],
    skipped: list[int] | None = None,
) -> Evaluation:
    """Evaluates the model in `folder` as `config.evaluation` says.

    `log`: of the engine, absent: one that is left behind only if the engine fails. `show` gets a progress
    line at every answered question; when `stop` is true the engine is ended, and `KeyboardInterrupt` raised.
    Raises `LaunchError` for what cannot be evaluated, `EngineError` if the engine fails.
    """
    from actors.errors import LoadError
    from actors.evaluation import figures
    from launch.subject import subject
    from learner.errors import LearnerError

    began, clock, settings = time.time(), time.monotonic(), config.evaluation
    try:
        with subject(folder, like=config.model.path, show=show) as weights:
            prompts, data = questions(config, weights.model)
            asked = asyncio.run(_interruptible(_ask(config, weights.model, prompts, log, show), stop))
    except (LearnerError, LoadError) as error:
        raise LaunchError(str(error)) from error
    return Evaluation(
        **msgspec.structs.asdict(figures(asked, settings.samples)),
        model=str(folder),
        version=weights.version,
        digest=weights.digest,
        lineage=weights.lineage,
        data=data,
        threshold=settings.threshold,
        sampling=settings.sampling.of(config.rollout.sampling),
        seed=config.seed,
        skipped=skipped or [],
        time=began,
        seconds=round(time.monotonic() - clock, 2),
    )


def questions(config: RunConfig, folder: Path) -> tuple[list[Prompt], str]:
    """The questions as prompts of the model in `folder`, in an order that never changes; and their file.

    Raises `LearnerError` for data that cannot be asked, `LaunchError` if none is named.
    """
    from learner.datasets import alone, held_out
    from learner.tokenizer import Tokenizer

    data, settings = config.data, config.evaluation
    if settings.data:
        data = alone(data, settings.data)
        data = msgspec.structs.replace(data, held_out="")
    if not (data.path or data.held_out or data.sources):
        raise LaunchError("no questions: give --data FILE, or a folder inside a run's folder")
    named = data.held_out or data.path or ", ".join(source.path for source in data.sources)
    prompts = held_out(data, Tokenizer(folder))
    return prompts[: settings.questions or None], named


async def _ask(
    config: RunConfig, folder: Path, prompts: list[Prompt], log: Path | None, show: Show
) -> list[Asked]:
    from actors.engine import Engine
    from actors.environments.base import load_environment
    from actors.environments.text import Tokens
    from actors.evaluation import ask
    from actors.rewards.pool import RewardPool
    from actors.rollout import Recipe

    rollout, settings = config.rollout, config.evaluation
    environment, rewards = load_environment(rollout.environment), RewardPool(rollout.reward, rollout.limits)
    recipe = Recipe(
        actor="evaluator",
        actor_epoch=0,
        run_seed=config.seed,
        group_size=settings.samples,
        sampling=settings.sampling.of(rollout.sampling),
        environment=environment,
        timeout_s=rollout.environment.timeout_s,
        rewards=rewards,
        text=Tokens(folder / "tokenizer.json"),
        invalid=collections.Counter(),
    )

    def tell(found: list[Asked]) -> None:
        show(progress_bar(found, len(prompts), settings.samples))

    show(f"starting an engine on {folder} ...")
    with _engine_log(log) as path:
        engine = await Engine.start(
            folder, config.engine, name="evaluator", seed=config.seed, log=path, load_format="auto"
        )
        try:
            return await ask(
                engine,
                prompts,
                recipe,
                threshold=settings.threshold,
                concurrency=settings.concurrency,
                show=tell,
            )
        finally:
            await asyncio.gather(engine.stop(), rewards.close(), environment.close())


@contextmanager
def _engine_log(log: Path | None) -> Iterator[Path]:
    """`log`, or a temporary file, which stays if an `EngineError` sends the user there."""
    path, failed = log or Path(tempfile.gettempdir()) / f"slipstream-eval-{os.getpid()}.log", False
    try:
        yield path
    except EngineError:
        failed = True
        raise
    finally:
        if log is None and not failed:
            path.unlink(missing_ok=True)


async def _interruptible(work: Coroutine[None, None, list[Asked]], stop: Callable[[], bool]) -> list[Asked]:
    """What `work` comes to; once `stop` is true it is cancelled, and `KeyboardInterrupt` raised."""
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.wait([task], timeout=_LOOK_S)
        if stop() and not task.done():
            task.cancel()
            await asyncio.wait([task])
            raise KeyboardInterrupt
    return task.result()


def progress_bar(found: list[Asked], total: int, samples: int) -> str:
    """How far an evaluation is, in one line.

    >>> progress_bar([Asked(0, 1, [1.0, 0.0], [3, 4], 0, {})], 4, 2)
    '[######------------------] 1/4 questions, mean@2 0.500 so far'
    """
    done = len(found) * _BAR // total
    mean = sum(one.passed for one in found) / (len(found) * samples)
    bar = "#" * done + "-" * (_BAR - done)
    return f"[{bar}] {len(found)}/{total} questions, mean@{samples} {mean:.3f} so far"


def render(found: Evaluation) -> str:
    """The evaluation as a page of text."""
    version = f"version {found.version}, digest {found.digest}" if found.version is not None else "no version"
    spread = f" +- {found.standard_error:.4f}" if found.standard_error is not None else ""
    lines = [
        f"model      {found.model}: {version}",
        f"questions  {found.questions} of {found.data}, {found.samples} answers each, temperature "
        f"{found.sampling.temperature:g}, top-p {found.sampling.top_p:g}, top-k {found.sampling.top_k}",
        f"mean@{found.samples:<5} {found.mean_at_k:.4f}{spread}   (reward >= {found.threshold:g})",
        "pass@k     " + ", ".join(f"{k}: {value:.4f}" for k, value in found.pass_at_k.items()),
        f"reward     {_shown(found.reward, '.4f')}",
        f"answers    {_shown(found.answer_tokens, '.1f')} tokens, {_shown(found.truncated, '.1%')} cut off",
    ]
    if found.invalid:
        causes = ", ".join(f"{count} {cause}" for cause, count in found.invalid.items())
        lines.append(f"invalid    {causes}: without a verdict, counted as not passed")
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
