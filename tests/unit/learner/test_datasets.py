"""Questions to prompts: the order, the templates, and real text."""

from __future__ import annotations

import json
import random
import textwrap
import tomllib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffer.schema import Prompt
from launch.tiny_model import make_tiny_qwen3
from learner.config import DataConfig, SourceConfig
from learner.datasets import PromptOrder, Share, held_out
from learner.errors import ConfigError, DataError, ModelError
from learner.rows import load_rows
from learner.tokenizer import Message, Tokenizer, model_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder."""
    return make_tiny_qwen3(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer(model)


def write(path: Path, *questions: str) -> str:
    path.write_text(
        "".join(json.dumps({"question": q, "answer": f"#### {len(q)}"}) + "\n" for q in questions)
    )
    return str(path)


def test_an_epoch_asks_every_question_once_and_the_next_in_another_order() -> None:
    prompts = [Prompt(row, [row], "#### 1") for row in range(20)]
    order = PromptOrder(prompts, seed=7)
    first, second = ([order.at(epoch * 20 + i).row for i in range(20)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_a_position_alone_determines_its_prompt() -> None:
    prompts = [Prompt(row, [row], "#### 1") for row in range(20)]
    whole = [prompt.row for prompt in islice(PromptOrder(prompts, seed=7), 60)]
    assert [PromptOrder(prompts, seed=7).at(position).row for position in range(60)] == whole
    assert [prompt.row for prompt in islice(PromptOrder(prompts, seed=8), 60)] != whole


def test_the_order_of_one_source_is_the_shuffle_of_its_rows() -> None:
    """Written down here, so that a run that is continued asks what it would have asked."""
    order = PromptOrder([Prompt(row, [row], "#### 1") for row in range(20)], seed=7)
    for epoch in range(3):
        rows = list(range(20))
        random.Random(f"7:{epoch}").shuffle(rows)
        assert [order.at(epoch * 20 + place).row for place in range(20)] == rows


def test_after_the_last_epoch_there_is_no_prompt() -> None:
    prompts = [Prompt(row, [row], "#### 1") for row in range(5)]
    order, endless = PromptOrder(prompts, seed=7, epochs=2), PromptOrder(prompts, seed=7)
    assert len(order) == 5
    assert [order.at(position) for position in range(10)] == [endless.at(position) for position in range(10)]
    assert [order.at(10), order.at(11), order.at(10**9)] == [None] * 3
    assert order.at(3) == endless.at(3)
    assert len(list(order)) == 10


@pytest.mark.parametrize("weight", [1.0, 2.0, 0.5, 2.5, 0.3])
def test_a_weight_says_how_often_an_epoch_asks_a_row(weight: float) -> None:
    share = Share(10, 20, weight)
    size = round(20 * weight)
    epochs = [share.taken(3, epoch) for epoch in range(20)]
    assert [len(indices) for indices in epochs] == [size] * 20
    counts = Counter(index for indices in epochs for index in indices)
    assert set(counts) == set(range(10, 30))
    assert max(counts.values()) - min(counts.values()) <= 1
    for indices in epochs:
        assert max(Counter(indices).values()) <= -(-size // 20) + 1
    assert weight in (1.0, 2.0) or epochs[0] != epochs[1]
    assert Share(10, 20, weight).taken(3, 7) == epochs[7]


def test_sources_are_mixed_by_weight(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *"abcdefgh")
    rows = [json.dumps({"problem": letter, "solution": rf"\boxed{{{letter}}}"}) for letter in "uvwxyz"]
    (tmp_path / "b.jsonl").write_text("\n".join(["", *rows]))
    math = SourceConfig(
        path=str(tmp_path / "b.jsonl"), question="problem", answer="solution", template="<{question}>"
    )
    sources = [SourceConfig(path=first, weight=0.25), msgspec.structs.replace(math, weight=2.0)]
    config = DataConfig(path="", sources=sources, answer_marker="", epochs=3)
    order, left_out = PromptOrder.load(config, tokenizer, 5)
    assert (len(order), left_out) == (14, 0)
    assert (order.at(41) is None, order.at(42)) == (False, None)
    asked = [[tokenizer.decode(order.at(epoch * 14 + i).tokens) for i in range(14)] for epoch in range(3)]
    for texts in asked:
        counts = Counter(texts)
        assert {text: count for text, count in counts.items() if "<" in text} == {
            f"<{x}>": 2 for x in "uvwxyz"
        }
        assert sum(count for text, count in counts.items() if "<" not in text) == 2
    assert len({text for texts in asked for text in texts if "<" not in text}) == 6
    prompts = {prompt.row: prompt for prompt in order}
    assert sorted(prompts)[-6:] == [9, 10, 11, 12, 13, 14]
    assert prompts[9].answer == r"\boxed{u}"
    assert [order.at(p).row for p in range(42)] == [prompt.row for prompt in order]


def test_sources_are_configured_as_documented(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs/data.md").read_text()
    (block,) = [part for part in page.split("\n\n    [data]\n")[1:] if "[[data.sources]]" in part]
    block = "    [data]\n" + block.partition("\n\n**")[0]
    config = msgspec.convert(tomllib.loads(textwrap.dedent(block))["data"], DataConfig)
    for source in config.sources:
        rows = [{source.question: f"{n}+1=", source.answer: rf"\boxed{{{n + 1}}}"} for n in range(4)]
        Path(source.path).write_text("\n".join(map(json.dumps, rows)))
    order, _ = PromptOrder.load(config, tokenizer, 0)
    assert len(order) == sum(4 * source.weight for source in config.sources)
    with pytest.raises(DataError, match=r"data.path: got none; give .* or data.sources"):
        PromptOrder.load(DataConfig(), tokenizer, 0)


def test_a_gold_answer_of_another_form_is_refused_until_that_is_meant(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "2+2=", "answer": "4"}')
    config = DataConfig(path=str(tmp_path / "d.jsonl"))
    with pytest.raises(DataError, match=r"line 1: answer: got '4', expected it to end in `####"):
        PromptOrder.load(config, tokenizer, 0)
    order, _ = PromptOrder.load(msgspec.structs.replace(config, answer_marker=""), tokenizer, 0)
    assert order.at(0).answer == "4"
    with pytest.raises(DataError, match="line 1: Object missing required field `problem`"):
        PromptOrder.load(msgspec.structs.replace(config, question="problem"), tokenizer, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "a", "sources": [SourceConfig(path="b")]}, "data.sources: got some with data.path"),
        ({"path": "a", "system": "s", "template": "{question}"}, "data.system: got one with data.template"),
        ({"path": "a", "min_prompt_tokens": 9, "max_prompt_tokens": 8}, "min_prompt_tokens: got 9"),
    ],
)
def test_settings_without_effect_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**fields)


def test_questions_get_a_line_break_a_template_or_the_chat_template(
    model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert tokenizer.decode(tokenizer.prompt("2+2=", "")) == "2+2=\n"
    assert tokenizer.decode(tokenizer.prompt("2+2=", "Q: {question} A:")) == "Q: 2+2= A:"
    for name, content in model_files(model).items():
        (tmp_path / name).write_bytes(content)
    message = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    template = message + "{% if add_generation_prompt %} ->{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = Tokenizer(tmp_path)
    assert chat.decode(chat.prompt("2+2=", "")) == "[user] 2+2= ->"
    assert chat.decode(chat.prompt("2+2=", "{question}")) == "2+2="
    assert chat.decode(chat.prompt("2+2=", "", "Be brief.")) == "[system] Be brief.[user] 2+2= ->"
    talk = [Message("user", "2+2="), Message("assistant", "5"), Message("user", "Sure?")]
    assert chat.decode(chat.prompt(talk, "")) == "[user] 2+2=[assistant] 5[user] Sure? ->"
    with pytest.raises(DataError, match="a list of messages: needs a chat template"):
        tokenizer.prompt(talk, "")
    with pytest.raises(DataError, match="a list of messages: needs a chat template"):
        chat.prompt(talk, "{question}")
    with pytest.raises(DataError, match=r"data\.system: needs a chat template"):
        tokenizer.prompt("2+2=", "", "Be brief.")


def test_long_prompts_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "short", "much longer than that")
    order, left_out = PromptOrder.load(DataConfig(path=path, max_prompt_tokens=10), tokenizer, 0)
    assert (len(order), left_out, order.at(0).row) == (1, 1, 0)
    order, left_out = PromptOrder.load(DataConfig(path=path, min_prompt_tokens=10), tokenizer, 0)
    assert (len(order), left_out, order.at(0).row) == (1, 1, 1)
    with pytest.raises(DataError, match=r"got 1 and 3, the prompts of .* have 6 to 22 tokens; widen them"):
        PromptOrder.load(DataConfig(path=path, max_prompt_tokens=3), tokenizer, 0)


def test_measuring_takes_the_held_out_questions_else_the_training_ones(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    train, held = write(tmp_path / "t.jsonl", "a", "b"), write(tmp_path / "h.jsonl", "c")
    assert len(held_out(DataConfig(path=train, held_out=held), tokenizer)) == 1
    assert len(held_out(DataConfig(path=train), tokenizer)) == 2
    mixed = DataConfig(path="", sources=[SourceConfig(path=train)], held_out=held, epochs=1)
    assert len(held_out(mixed, tokenizer)) == 1


def test_all_of_gsm8k_is_read_and_comes_back_from_its_tokens(test_data: Path, tokenizer: Tokenizer) -> None:
    for name, rows in (("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319)):
        examples = load_rows(str(test_data / name))
        assert len(examples) == rows
        for example in examples[::50]:
            assert tokenizer.decode(tokenizer.encode(example.question)) == example.question


def test_all_of_math_500_is_read(test_data: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig(
        path=str(test_data / "math500.jsonl"), question="problem", answer="solution", answer_marker=r"\boxed{"
    )
    order, left_out = PromptOrder.load(msgspec.structs.replace(config, max_prompt_tokens=4096), tokenizer, 0)
    assert (len(order), left_out) == (500, 0)


def test_a_folder_without_its_parts_is_no_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        Tokenizer(tmp_path)
    for name, content in model_files(model).items():
        (tmp_path / name).write_bytes(content)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        del values["eos_token_id"]
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ModelError, match="eos_token_id: missing"):
        Tokenizer(tmp_path)
