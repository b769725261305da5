"""Questions to prompts: the order, the templates, and real text."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from buffer.schema import Prompt
from launch.tiny_model import make_tiny_qwen3
from learner.config import DataConfig
from learner.datasets import PromptOrder, held_out, load_jsonl
from learner.errors import DataError, ModelError
from learner.tokenizer import Tokenizer, model_files


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


def test_long_prompts_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "short", "much longer than that")
    order, left_out = PromptOrder.load(DataConfig(path=path, max_prompt_tokens=10), tokenizer, 0)
    assert (len(order), left_out, order.at(0).row) == (1, 1, 0)
    with pytest.raises(DataError, match=r"max_prompt_tokens: got 3, the shortest prompt of .* has 6 tokens"):
        PromptOrder.load(DataConfig(path=path, max_prompt_tokens=3), tokenizer, 0)


def test_measuring_takes_the_held_out_questions_else_the_training_ones(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    train, held = write(tmp_path / "t.jsonl", "a", "b"), write(tmp_path / "h.jsonl", "c")
    assert len(held_out(DataConfig(path=train, held_out=held), tokenizer)) == 1
    assert len(held_out(DataConfig(path=train), tokenizer)) == 2


def test_all_of_gsm8k_is_read_and_comes_back_from_its_tokens(test_data: Path, tokenizer: Tokenizer) -> None:
    for name, rows in (("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319)):
        examples = load_jsonl(test_data / name)
        assert len(examples) == rows
        for example in examples[::50]:
            assert tokenizer.decode(tokenizer.encode(example.question)) == example.question


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
