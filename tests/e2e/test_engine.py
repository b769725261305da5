"""A real SGLang server on the CPU: its numbers are transformers', its seeds work, its weights change."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from actors.config import EngineConfig, Sampling, SamplingConfig
from actors.engine import Engine
from actors.errors import EngineError
from weightsync.errors import WeightSyncError
from weightsync.manifest import Manifest
from weightsync.transports.stock import StockGroup

pytestmark = pytest.mark.asyncio(loop_scope="module")

EOS = 257
CONFIG = EngineConfig(max_running_requests=64, max_total_tokens=4096, start_timeout_s=120)
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def make_model(folder: Path, seed: int) -> torch.nn.Module:
    """A tiny Qwen3 with random weights, saved to `folder`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    return model


def reference(model: torch.nn.Module, sequence: list[int], temperature: float = 1.0) -> np.ndarray:
    """Transformers' log-probabilities of tokens 1.. of a sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, :-1] / temperature
    chosen = torch.tensor(sequence[1:])[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return make_model(folder, seed=0)


@pytest.fixture(scope="module")
async def engine(folder: Path, model: torch.nn.Module):
    log = folder / "engine.log"
    engine = await Engine.start(folder, CONFIG, name="test", seed=0, log=log, load_format="auto")
    yield engine
    await engine.stop()


async def test_its_keys_are_on_no_command_line_and_nothing_goes_without_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (engine.pid, *members(engine.pid))]
    assert any(b"--config" in line for line in lines)
    assert not any(key.encode() in line for key in engine._calls._keys for line in lines)
    monkeypatch.setattr(engine._calls, "_keys", ("guessed", "guessed"))
    with pytest.raises(EngineError, match="status 401"):
        await engine.score([[1, 2]])


async def test_scores_equal_transformers_for_ragged_lengths(engine: Engine, model) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 320, length).tolist() for length in (2, 3, 17, 64, 5, 130)]
    for sequence, found in zip(sequences, (await engine.score(sequences))[1], strict=True):
        np.testing.assert_allclose(found, reference(model, sequence), atol=1e-4)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
async def test_filters_cut_the_draw(engine: Engine, cut: dict[str, float]) -> None:
    greedy = await engine.generate(PROMPT, [1, 2], Sampling(temperature=0.0, max_new_tokens=12))
    assert greedy[0].tokens == greedy[1].tokens
    free = await engine.generate(PROMPT, [1, 2], Sampling(temperature=1.5, max_new_tokens=12))
    assert all(answer.tokens != greedy[0].tokens for answer in free)
    filtered = Sampling(temperature=1.5, max_new_tokens=12, **cut)
    assert [one.tokens for one in await engine.generate(PROMPT, [1, 2], filtered)] == [
        one.tokens for one in greedy
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
async def test_answers_carry_transformers_logprobs_after_temperature(engine, model, temperature) -> None:
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=24)
    lengths = (1, 7, 40)
    groups = await asyncio.gather(*(engine.generate([3] * n, range(4), sampling) for n in lengths))
    for length, group in zip(lengths, groups, strict=True):
        for answer in group:
            expected = reference(model, [3] * length + answer.tokens, temperature)[length - 1 :]
            np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)
            assert answer.labels == [(len(answer.tokens), "default")]


async def test_a_seed_repeats_an_answer_and_another_changes_it(engine: Engine) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    first = await engine.generate(PROMPT, [1, 2, 3, 1], sampling)
    again = await engine.generate(PROMPT, [3, 1], sampling)
    assert first[0].tokens == first[3].tokens == again[1].tokens
    assert first[2].tokens == again[0].tokens
    assert len({tuple(answer.tokens) for answer in first}) == 3


async def test_seeded_draws_follow_the_distribution(engine: Engine, model) -> None:
    answers = await engine.generate(PROMPT, range(4000), SamplingConfig(max_new_tokens=1))
    counts = np.bincount([answer.tokens[0] for answer in answers], minlength=320)
    with torch.no_grad():
        expected = 4000 * model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1).double().numpy()
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())


async def test_the_stop_token_is_the_last_token_with_its_logprob(engine: Engine, model) -> None:
    sampling = SamplingConfig(max_new_tokens=200, temperature=1.5)
    answers = await engine.generate(PROMPT, range(32), sampling)
    stopped = [answer for answer in answers if answer.finish_reason == "stop"]
    assert stopped, "none of 32 answers reached the end-of-sequence token"
    for answer in stopped:
        assert answer.tokens[-1] == EOS
        assert EOS not in answer.tokens[:-1]
        expected = reference(model, PROMPT + answer.tokens, 1.5)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)
    word = answers[0].tokens[0]
    only = await engine.generate(PROMPT, [0], msgspec.structs.replace(sampling, stop_token_ids=[word]))
    assert (only[0].tokens, only[0].finish_reason) == ([word], "stop")


async def test_the_engine_says_how_much_it_has_to_do(engine: Engine) -> None:
    sampling = SamplingConfig(max_new_tokens=400, ignore_eos=True)
    generating = asyncio.create_task(engine.generate(PROMPT, range(6), sampling))
    running, usage = 0, 0.0
    while not generating.done():
        load = await engine.load()
        running, usage = max(running, load.running), max(usage, load.usage)
        await asyncio.sleep(0.05)
    assert running == 6
    assert 0.0 < usage < 1.0


async def test_a_refused_request_says_why(engine: Engine) -> None:
    with pytest.raises(EngineError, match="/generate: status 400"):
        await engine.generate([1] * 2000, [0], SamplingConfig())
    assert await engine.alive()


async def test_weights_arrive_over_gloo_and_the_label_follows(engine: Engine, tmp_path: Path) -> None:
    group = await meet(engine, "epoch1")
    for version, seed in ((1, 11), (2, 22)):
        new = make_model(tmp_path / str(version), seed)
        tensors = exported(new)
        manifest = Manifest.of(version, tensors)
        update = asyncio.create_task(engine.update_weights(group="epoch1", manifest=manifest))
        await asyncio.to_thread(group.send, tensors)
        await update
        _, found = await engine.score([PROMPT])
        np.testing.assert_allclose(found[0], reference(new, PROMPT), atol=1e-4)
        answer = (await engine.generate(PROMPT, [1], SamplingConfig(max_new_tokens=4)))[0]
        assert answer.labels == [(len(answer.tokens), manifest.label)]
    group.close()


async def test_a_missing_engine_ends_the_meeting_in_time() -> None:
    with pytest.raises(WeightSyncError, match="did not come"):
        await asyncio.to_thread(
            StockGroup.open, "nobody", address="127.0.0.1", timeout_s=2, invite=lambda port: None
        )


async def test_an_engine_killed_in_the_group_ends_the_send_and_leaves_no_process(
    folder: Path, model, tmp_path: Path
) -> None:
    log, before = tmp_path / "engine.log", set(Path("/dev/shm").glob("sglang*"))
    engine = await Engine.start(folder, CONFIG, name="victim", seed=0, log=log)
    group = await meet(engine, "epoch2", timeout_s=5)
    engine.kill()
    with pytest.raises(WeightSyncError, match="did not take"):
        await asyncio.to_thread(group.send, exported(model))
    group.close()
    with pytest.raises(EngineError, match="is the server gone"):
        await engine.generate(PROMPT, [0], SamplingConfig())
    assert not await engine.alive()
    await engine.stop()
    assert members(engine.pid) == []
    assert set(Path("/dev/shm").glob("sglang*")) == before


async def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no config\.json"):
        await Engine.start(tmp_path / "no", CONFIG, name="x", seed=0, log=tmp_path / "log")


async def test_running_out_of_memory_is_named(folder: Path, model, tmp_path: Path, little_memory) -> None:
    config = msgspec.structs.replace(CONFIG, max_total_tokens=8_000_000)
    with pytest.raises(EngineError, match="ran out of memory") as failure:
        await Engine.start(folder, config, name="big", seed=0, log=tmp_path / "log")
    assert "max_total_tokens" in str(failure.value)


@pytest.fixture
def little_memory():
    """Processes started meanwhile get at most 6 GiB of address space; the cache above wants 8."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def exported(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint; a tied output layer is not one of them."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


async def meet(engine: Engine, name: str, timeout_s: float = 30) -> StockGroup:
    """A group with the engine, as learner and actor make it."""
    loop, joining = asyncio.get_running_loop(), []

    def invite(port: int) -> None:
        join = engine.join_group(group=name, address="127.0.0.1", port=port)
        joining.append(asyncio.run_coroutine_threadsafe(join, loop))

    group = await asyncio.to_thread(
        StockGroup.open, name, address="127.0.0.1", timeout_s=timeout_s, invite=invite
    )
    await asyncio.wrap_future(joining[0])
    return group


def members(group: int) -> list[int]:
    """Processes of a process group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if os.getpid() != int(entry.name) and int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found
