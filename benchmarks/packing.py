"""Packed against padded batches: how much is padding, and tokens a second of forward and backward pass.

    python -m benchmarks.packing [--json] [--quick]

A step of 512 answers, 64 prompts with 8 each, in micro-batches of at most `BUDGET` tokens. Lengths: those
of GSM8K's questions with their solutions, under a byte-pair vocabulary of 8,192 learned from them, if
SLIPSTREAM_TEST_DATA names the folder of `gsm8k_train.jsonl`, else log-normal ones like them; and log-normal
ones with a long tail. *padding* is what is fed but is no token of an answer or its prompt, with positions
shared by 1 x 1, 2 x 2 and 4 x 4 ranks (context x tensor); *unfilled* is what micro-batches could hold
beside. Padded batches hold sequences in order of arrival, as many as fit the budget at the length of
their longest. *in_turn* and *by_tokens*: how much more work the busiest of 4 data-parallel ranks has than
the mean, by estimated FLOPs, with groups dealt in turn and by their tokens.

Tokens a second are real ones, of a small Qwen3 (4 layers, width 256) on this host's CPU in fp32 with an
answer's tokens as targets, both ways in turn in one process, the median of five turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import parser, progress, report, table
from buffer.batches import Assignment, Manifest
from learner.flops import cost_of
from learner.model.hf_config import read_shape
from learner.packing import MicroBatch, Row, pack, row_of_tokens

PROMPTS, SAMPLES = 64, 8
BUDGET = 4096
LAYOUTS = ((1, 1), (2, 2), (4, 4))
"""Context x tensor parallel ranks."""
RANKS = 4
AIM = 0.03
"""Most padding."""
Lengths = np.ndarray
"""Integer [prompts, samples, 2]: tokens of each sample's prompt and answer."""


def gsm8k(folder: Path) -> Lengths:
    """A prompt's answers have the lengths of its solution and of seven others in the data set."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rows = [json.loads(line) for line in (folder / "gsm8k_train.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        (text for row in rows for text in row.values()),
        trainers.BpeTrainer(vocab_size=8192, show_progress=False),
    )
    chosen = np.random.default_rng(0).permutation(len(rows))[: PROMPTS * SAMPLES]
    counts = [
        [len(tokenizer.encode(rows[index][name]).ids) for name in ("question", "answer")] for index in chosen
    ]
    lengths = np.array(counts).reshape(PROMPTS, SAMPLES, 2)
    lengths[:, :, 0] = lengths[:, :1, 0]
    return lengths


def log_normal(median: float, spread: float, longest: int) -> Lengths:
    """Prompts of about 70 tokens; half of the variance of answers is their prompt's."""
    source = np.random.default_rng(0)
    hard = source.normal(0, spread / 2**0.5, (PROMPTS, 1))
    answers = median * np.exp(hard + source.normal(0, spread / 2**0.5, (PROMPTS, SAMPLES)))
    prompts = 70 * np.exp(source.normal(0, 0.4, (PROMPTS, 1))).repeat(SAMPLES, axis=1)
    return np.stack([np.maximum(prompts, 5), np.clip(answers, 5, longest)], axis=2).astype(int)


def rows_of(lengths: Lengths) -> list[Row]:
    """Rows of random tokens."""
    source = np.random.default_rng(1)
    return [
        row_of_tokens(source.integers(0, 256, prompt + answer).tolist(), prompt)
        for prompt, answer in lengths.reshape(-1, 2).tolist()
    ]


def padded(rows: Sequence[Row]) -> list[MicroBatch]:
    """In order of arrival, each micro-batch padded to its longest sequence."""
    return [
        pack(
            [replace(row, tokens=np.pad(row.tokens, (0, longest - len(row.tokens)))) for row in part], 1 << 30
        )[0]
        for part, longest in _arrivals(rows)
    ]


def _arrivals(rows: Sequence[Row]) -> Iterator[tuple[list[Row], int]]:
    part: list[Row] = []
    longest = 0
    for row in rows:
        if part and (len(part) + 1) * (max(longest, len(row.tokens)) - 1) > BUDGET:
            yield part, longest
            part, longest = [], 0
        part.append(row)
        longest = max(longest, len(row.tokens))
    yield part, longest


def waste(rows: Sequence[Row]) -> dict[str, float]:
    """Shares of what is fed, or could be, that are no tokens of `rows`."""
    real = sum(len(row.tokens) - 1 for row in rows)
    found = {}
    for context, tensor in LAYOUTS:
        batches = pack(rows, BUDGET, context=context, tensor=tensor)
        found[f"padding_{context}x{tensor}"] = 1 - real / _fed(batches)
    found["unfilled"] = 1 - real / (BUDGET * len(pack(rows, BUDGET)))
    found["padding_padded"] = 1 - real / _fed(padded(rows))
    return found


def _fed(batches: Sequence[MicroBatch]) -> int:
    return sum(len(batch.tokens) for batch in batches)


def unevenness(lengths: Lengths, folder: Path) -> dict[str, float]:
    """Of the ranks' work: the largest over the mean, less 1."""
    cost = cost_of(read_shape(folder))
    work = np.array([cost.flops(group.sum(axis=1), group[:, 1]).sum() for group in lengths])
    fed = [int(group.sum()) - len(group) for group in lengths]
    rows = [Assignment(f"{i:04d}", "", 0, 0, tokens) for i, tokens in enumerate(fed)]
    manifest = Manifest(rows)
    shares = [[int(row.group) for row in manifest.share(rank, RANKS)] for rank in range(RANKS)]
    by_tokens = [work[share].sum() for share in shares]
    in_turn = [work[rank::RANKS].sum() for rank in range(RANKS)]
    return {
        name: float(max(of) / np.mean(of) - 1)
        for name, of in (("in_turn", in_turn), ("by_tokens", by_tokens))
    }


def speed(rows: Sequence[Row], folder: Path, turns: int) -> dict[str, float]:
    """Real tokens a second of forward and backward passes, packed and padded."""
    from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
    from learner.model.forward import target_logprobs
    from learner.step import Trainer

    trainer = Trainer(folder, ModelConfig(path=str(folder)), OptimizerConfig(), ObjectiveConfig())

    def turn(batches: Sequence[MicroBatch]) -> float:
        trainer._parallel.zero_grad_buffer()
        began = time.perf_counter()
        for batch in batches:
            logprobs, _ = target_logprobs(trainer._parallel, batch, 1024)
            (-logprobs.sum()).backward()
        return time.perf_counter() - began

    ways = {"packed": pack(rows, BUDGET), "padded": padded(rows)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(turns + 1):
        for name, batches in ways.items():
            taken = turn(batches)
            if number:  # the first is a warm-up
                seconds[name].append(taken)
    real = sum(len(row.tokens) - 1 for row in rows)
    return {f"{name}_tokens_per_s": real / statistics.median(of) for name, of in seconds.items()}


def measure(lengths: Lengths, folder: Path, quick: bool) -> dict[str, float]:
    """All figures of one distribution of lengths."""
    lengths = lengths[:12] if quick else lengths
    rows = rows_of(lengths)
    figures = {"mean": float(lengths.sum(axis=2).mean()), "longest": float(lengths.sum(axis=2).max())}
    figures |= {**waste(rows), **unevenness(lengths, folder)}
    return figures | speed(rows[: 4 if quick else 128], folder, 1 if quick else 5)


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    options = parser(__doc__ or "").parse_args(arguments)
    from launch.tiny_model import make_tiny_qwen3

    data = Path(os.environ.get("SLIPSTREAM_TEST_DATA", ""))
    real = not options.quick and (data / "gsm8k_train.jsonl").is_file()
    sources: dict[str, Callable[[], Lengths]] = {
        "gsm8k" if real else "gsm8k_like": lambda: gsm8k(data) if real else log_normal(100, 0.4, 400),
        "long_tail": lambda: log_normal(300, 1.0, 4000),
    }
    result: dict[str, Any] = {"aim": AIM, "budget": BUDGET, "lengths": {}}
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as scratch:
        folder = make_tiny_qwen3(Path(scratch) / "model", seed=0, hidden=256, layers=4, intermediate=768)
        for name, source in sources.items():
            progress(f"lengths {name}")
            result["lengths"][name] = measure(source(), folder, options.quick)
    names = list(result["lengths"])
    keys = list(result["lengths"][names[0]])
    rows = [[key, *(result["lengths"][name][key] for name in names)] for key in keys]
    report(result, table(["figure", *names], rows), options)


if __name__ == "__main__":
    main(sys.argv[1:])
