"""The examples: short, run as their texts say, and fit for a run as their TOML says."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.config import LimitsConfig, RolloutConfig, SamplingConfig
from actors.continuation import Completion
from actors.environments.base import load_environment
from actors.environments.text import Tokens
from actors.rewards.pool import RewardPool
from actors.rollout import rollout
from buffer.schema import Prompt
from examples.custom_loss import lenient
from examples.tool_use import main
from launch.config import load
from launch.tiny_model import EOS_ID, make_tiny_qwen3
from learner.config import ObjectiveConfig
from learner.objective.losses import loss_named
from learner.tokenizer import Tokenizer
from tests.unit.actors.scripted import LEASE, Letters, ScriptedEngine, recipe, said

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

LAST_LINES = {
    "custom_loss": "loss -0.833, gradient [-0.333, -0.667, 0.167]",
    "custom_reward": "0.10 {'correct': 0.1, 'correct.correct': 0.0, 'correct.format': 1.0, 'sound': 0.0",
    "custom_environment": "policy 37, environment '', award 0.8",
    "custom_tool": "error: raised: KeyError: 'yard' (custom_tool.py:",
    "tool_use": "7300 questions in ",
    "verifiers_environment": "1 questions in held_out.jsonl",
}


def settings(path: Path) -> RolloutConfig:
    """What the TOML in an example's text configures."""
    text = path.read_text().split('"""')[1].partition("PYTHONPATH:\n")[2].partition("\n`python")[0]
    return msgspec.convert(tomllib.loads(textwrap.dedent(text))["rollout"], RolloutConfig)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    if path.stem == "verifiers_environment":
        pytest.importorskip("verifiers", reason="needs the extra `verifiers`")
    command = [sys.executable, "-m", f"examples.{path.stem}", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith(LAST_LINES[path.stem])


def test_the_loss_is_one_that_a_run_may_name() -> None:
    toml = (
        (ROOT / "examples/custom_loss.py").read_text().partition("PYTHONPATH:\n")[2].partition("\n`python")[0]
    )
    config = msgspec.convert(tomllib.loads(textwrap.dedent(toml))["objective"], ObjectiveConfig)
    assert loss_named(config.loss) is lenient


async def test_the_reward_scores_as_configured() -> None:
    config = settings(ROOT / "examples/custom_reward.py")
    pool = RewardPool(config.reward, config.limits)
    assert (await pool.score("3*4=13, 12+5=17\n#### 17", "#### 17", 9)).value == pytest.approx(1.1)
    await pool.close()


async def test_the_environment_awards_and_its_hints_are_not_trained() -> None:
    config = settings(ROOT / "examples/custom_environment.py")
    lease = msgspec.structs.replace(LEASE, prompt=Prompt(9, [5, 6], "37"))
    engine = ScriptedEngine(said("37"), said("50"), said("12"), said("37"))
    changes: dict[str, Any] = {
        "environment": load_environment(config.environment),
        "rewards": RewardPool(config.reward, config.limits),
        "text": Letters(),
    }
    group = await rollout(engine, lease, recipe(2, **changes))
    assert [sample.reward for sample in group.samples] == [1.0, pytest.approx(0.8)]
    second = group.samples[1]
    assert Letters().decode(second.tokens.tolist()[2:]) == "50 lower 12 higher 37"
    assert second.loss_runs == [2, 7, 2, 8, 2]


async def test_the_tool_is_called_by_the_policy() -> None:
    tools = load_environment(settings(ROOT / "examples/custom_tool.py").environment)
    call = '{"name": "convert", "arguments": {"value": 1, "unit": "km", "to": "m"}}'
    engine = ScriptedEngine(*[said(f"<tool_call>{call}</tool_call>")] * 2, *[said("#### 1000")] * 2)
    changes: dict[str, Any] = {
        "environment": tools,
        "text": Letters(),
        "sampling": SamplingConfig(max_new_tokens=1000),
    }
    group = await rollout(engine, LEASE, recipe(2, **changes))
    await tools.close()
    assert "1000 m" in Letters().decode(group.samples[0].tokens.tolist())


async def test_an_environment_of_verifiers_runs_its_tool_and_its_rubric(tmp_path: Path) -> None:
    """On a question as its file has it."""
    pytest.importorskip("verifiers", reason="needs the extra `verifiers`")
    from examples.verifiers_environment import load_environment as make
    from launch.verifiers import write_verifiers

    theirs = load_environment(settings(ROOT / "examples/verifiers_environment.py").environment)
    train, _ = write_verifiers(f"{make.__module__}:{make.__name__}", tmp_path, arguments={})
    row = json.loads(train.read_text().splitlines()[-1])
    call = '{"name": "count", "arguments": {"word": "mississippi", "letter": "s"}}'
    engine = ScriptedEngine(*[said(f"<tool_call>{call}</tool_call>")] * 2, said("It is 4"), said("It is 3"))
    lease = msgspec.structs.replace(LEASE, prompt=Prompt(9, [5, 6], row["answer"]))
    changes: dict[str, Any] = {
        "environment": theirs,
        "rewards": RewardPool({}, LimitsConfig()),
        "text": Letters(),
        "sampling": SamplingConfig(max_new_tokens=1000),
        "timeout_s": 120.0,
    }
    group = await rollout(engine, lease, recipe(2, **changes))
    await theirs.close()
    assert "4\n</tool_response>" not in Letters().decode(
        group.samples[0].tokens.tolist()
    )  # its frame is markup
    told = {
        Letters().decode(sample.tokens.tolist()).partition("</tool_call>")[2]: sample
        for sample in group.samples
    }
    assert {text: sample.reward for text, sample in told.items()} == {"4It is 4": 1.0, "4It is 3": 0.0}


async def test_what_is_demonstrated_is_what_a_rollout_holds(tmp_path: Path) -> None:
    """Token for token: the continuation that the warm-up shows is the context the policy meets."""
    config = load([ROOT / "examples/tool_use.toml"], [])
    main(tmp_path)
    lines = (tmp_path / "demonstrations.jsonl").read_text().splitlines()
    first, then = (json.loads(line)["question"] for line in lines[:2])
    model = make_tiny_qwen3(tmp_path / "model", seed=0)
    tokenizer, text = Tokenizer(model), Tokens(model / "tokenizer.json")
    prompt = tokenizer.prompt(first, config.data.template)
    call = [*text.encode(then.removeprefix(first).partition("<")[0]), EOS_ID]
    turns = [
        Completion(tokens, [-1.0] * len(tokens), "stop", [(len(tokens), "3:aa")])
        for tokens in (call, [EOS_ID])
    ]
    engine = ScriptedEngine(turns[0], turns[0], turns[1], turns[1])
    tools = load_environment(config.rollout.environment)
    lease = msgspec.structs.replace(LEASE, prompt=Prompt(9, prompt, "#### 1"))
    changes: dict[str, Any] = {"environment": tools, "text": text, "sampling": config.rollout.sampling}
    await rollout(engine, lease, recipe(2, **changes))
    await tools.close()
    opening, *others = [asked[0] for asked in engine.asked]
    assert (opening, len(others) > 0) == (prompt, True)
    assert all(asked == tokenizer.prompt(then, config.data.template) for asked in others)
