"""Configuration: TOML, overrides, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from launch.config import RunConfig, load, to_json
from launch.demo import demo_file
from launch.errors import LaunchError

MINIMAL = ["model.path=m", "data.path=d"]


def test_overrides_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('[optimizer]\nlr = 1e-3\nclip_grad = 0.1\n[model]\npath = "m"\n[data]\npath = "d"\n')
    second.write_text("[optimizer]\nlr = 2e-3\n")
    config = load([first, second], ["stream.max_steps=7", "objective.correction=none"])
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (2e-3, 0.1)
    assert (config.stream.max_steps, config.objective.correction) == (7, "none")


def test_several_rewards_are_a_table(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[rollout.reward.correct]\nfunction = "actors.rewards:math_verify"\n'
        '[rollout.reward.short]\nfunction = "actors.rewards:brevity"\nweight = 0.1\n'
        "arguments = { longest = 512 }\n"
    )
    config = load([file], MINIMAL)
    assert isinstance(config.rollout.reward, dict)
    assert {name: (part.weight, part.arguments) for name, part in config.rollout.reward.items()} == {
        "correct": (1.0, {}),
        "short": (0.1, {"longest": 512}),
    }
    assert msgspec.json.decode(to_json(config), type=RunConfig) == config


def test_the_resolved_configuration_loads_as_itself() -> None:
    config = load([demo_file()], [])
    assert msgspec.json.decode(to_json(config), type=RunConfig) == config
    assert config.sft is not None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stream.max_stalenes=3",
            "stream: Object contains unknown field `max_stalenes`; known are groups_per_step",
        ),
        ("sft.lrr=3", "sft: Object contains unknown field `lrr`; known are"),
        ("nonsense=3", "Object contains unknown field `nonsense`; known are name"),
        ("stream.max_steps=many", "stream.max_steps: Expected `int`, got `str`"),
        ("stream.group_size=1", "stream.group_size: Expected `int` >= 2"),
        ("objective.correction=magic", "objective.correction: Invalid enum value 'magic'"),
        (
            "rollout.limits.memory=3",
            "rollout.limits: Object contains unknown field `memory`; known are workers",
        ),
        (
            "rollout.reward.right={ function='m:f', wait=1 }",
            "rollout.reward[...]: Object contains unknown field `wait`; known are function, weight",
        ),
        (
            "data.sources=[{ path='d', wait=1 }]",
            "data.sources[0]: Object contains unknown field `wait`; known are path, weight",
        ),
        ("data.min_prompt_tokens=2000", "data.min_prompt_tokens: got 2000, expected at most"),
        ("rollout.reward=3", "rollout.reward: Expected `str | object`, got `int`"),
        ("rollout.sampling.top_p=0.9", "top_p: got 0.9, expected 1.0"),
        ("stream.max_steps", "expected section.field=value"),
        ("name.first=x", "is a value, not a section"),
        ("name=a/b", "expected letters, digits"),
    ],
)
def test_bad_fields_are_named_with_what_is_allowed(override: str, said: str) -> None:
    with pytest.raises(LaunchError) as caught:
        load([], ["name=n", *MINIMAL, override])
    assert said in str(caught.value)


def test_a_missing_file_and_bad_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot read"):
        load([tmp_path / "none.toml"], [])
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(LaunchError, match=r"bad\.toml"):
        load([bad], [])
