"""The learner's forward and backward pass on one GPU: packed against padded, and the chunked output layer.

    python -m benchmarks.gpu_learner [--json] [--models dense next] [--untuned]

Random weights in bf16; 96 sequences whose lengths have a long tail. Packed: first-fit decreasing into
micro-batches of at most `BUDGET` tokens. Padded: in order of arrival, each micro-batch padded to its
longest, at most `BUDGET` tokens with the padding. Seconds are the median of five turns after two that
are not counted; tokens are real ones. `--untuned` measures no kernel's configurations, which takes
flash-linear-attention many minutes, and compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

BUDGET = 16_384
COMMON = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        **COMMON,
        "model_type": "qwen3",
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "next": {
        **COMMON,
        "model_type": "qwen3_next",
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
}
"""Widths of published models, fewer layers and experts: it fits one card and fills it."""


def lengths() -> list[int]:
    """96 lengths of a mean of about 700 tokens, the longest 4,096."""
    drawn = np.random.default_rng(0).lognormal(6.2, 0.8, 96)
    return np.clip(drawn, 32, 4096).astype(int).tolist()


def write_checkpoint(fields: dict[str, Any], folder: Path) -> None:
    """A random checkpoint of the model that `fields` describe."""
    import torch
    from safetensors.torch import save_file

    from learner.convert.names import hf_shapes
    from learner.model.hf_config import shape_of

    source = torch.Generator("cuda").manual_seed(0)
    tensors = {
        name: torch.empty(dims, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02, generator=source).cpu()
        for name, dims in hf_shapes(shape_of(fields)).items()
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors")


def arrival_batches(sizes: list[int]) -> Iterator[list[int]]:
    """Indices of sequences, in order, as many at a time as fit `BUDGET` when padded to their longest."""
    chosen: list[int] = []
    for index in range(len(sizes)):
        if chosen and (len(chosen) + 1) * max(sizes[i] for i in [*chosen, index]) > BUDGET:
            yield chosen
            chosen = []
        chosen.append(index)
    yield chosen


def batches_of(padded: bool) -> list[Any]:
    """The micro-batches of all sequences; padding is fed, but is no target."""
    from learner.packing import pack, row_of_tokens

    source = np.random.default_rng(1)
    rows = [row_of_tokens(source.integers(0, 50_000, length + 1).tolist(), 1) for length in lengths()]
    if not padded:
        return pack(rows, BUDGET)
    found = []
    for members in arrival_batches(lengths()):
        longest = max(len(rows[index].tokens) for index in members)
        wide = [
            replace(rows[i], tokens=np.pad(rows[i].tokens, (0, longest - len(rows[i].tokens))))
            for i in members
        ]
        found += pack(wide, 2**30)
    return found


def untuned() -> None:
    """Triton measures no kernel's configurations, and torch compiles nothing.

    It takes the last of those with the fewest stages: more of them need more shared memory than there may be.
    """
    import torch
    from triton.runtime.autotuner import Autotuner

    def one(self: Autotuner, *_args: object, **_kwargs: object) -> list:
        fewest = min(config.num_stages for config in self.configs)
        return [config for config in self.configs if config.num_stages == fewest][-1:]

    Autotuner.prune_configs = one
    torch.compiler.set_stance("force_eager")


def timed(turn: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of `turn`, and the GPU memory at its peak in bytes."""
    import torch

    seconds = []
    for number in range(7):
        if number == 2:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        turn()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:]), torch.cuda.max_memory_allocated()


def measure(fields: dict[str, Any], folder: Path) -> dict[str, float]:
    """Tokens a second packed and padded, and the peak of memory with and without chunks."""
    from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
    from learner.model.forward import target_logprobs
    from learner.step import Trainer

    write_checkpoint(fields, folder)
    config = ModelConfig(path=str(folder), micro_batch_tokens=BUDGET, dtype="bfloat16")
    trainer = Trainer(folder, config, OptimizerConfig(), ObjectiveConfig())
    device = next(trainer._model.parameters()).device

    def pass_over(batches: list[Any], chunk: int) -> Callable[[], None]:
        moved = [batch.to(device) for batch in batches]

        def turn() -> None:
            trainer._parallel.zero_grad_buffer()
            for batch in moved:
                logprobs, _ = target_logprobs(trainer._parallel, batch, chunk)
                (-logprobs.mean()).backward()

        return turn

    packed, padded = batches_of(padded=False), batches_of(padded=True)
    tokens, fed = sum(lengths()), sum(len(batch.tokens) for batch in padded)
    packed_s, chunked = timed(pass_over(packed, 1024))
    padded_s, _ = timed(pass_over(padded, 1024))
    _, whole = timed(pass_over(packed[:1], BUDGET))
    _, chunked_one = timed(pass_over(packed[:1], 1024))
    return {
        "parameters": float(sum(p.numel() for p in trainer._model.parameters())),
        "tokens": float(tokens),
        "padding": 1 - tokens / fed,
        "packed_tokens_per_s": tokens / packed_s,
        "padded_tokens_per_s": tokens / padded_s,
        "speedup": padded_s / packed_s,
        "peak_gb": chunked / 1e9,
        "one_batch_peak_gb": chunked_one / 1e9,
        "one_batch_unchunked_peak_gb": whole / 1e9,
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="the last line printed is one JSON object")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--untuned", action="store_true", help="measure no kernel's configurations")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_learner: got no CUDA GPU, expected one; see docs/gpu.md")
    if options.untuned:
        untuned()
    found = {}
    with tempfile.TemporaryDirectory(prefix="slipstream-gpu-") as folder:
        for name in options.models:
            found[name] = measure(MODELS[name], Path(folder) / name)
            figures = " | ".join(f"{key} {value:.4g}" for key, value in found[name].items())
            print(f"{name}: {figures}", flush=True)
    if options.json:
        print(json.dumps({"card": torch.cuda.get_device_name(), "models": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
