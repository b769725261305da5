"""Tiny random Qwen3 checkpoints, written by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
"""A shape in which no two widths that could be confused are equal (heads * head_dim != hidden)."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bitwise comparisons hold for one thread count; the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, torch.nn.Module]]:
    """A factory of (folder, transformers model): weights of std 0.1, norms perturbed around 1."""

    import transformers

    def make(seed: int = 0, std: float = 0.1, **overrides: object) -> tuple[Path, torch.nn.Module]:
        rope = {"rope_theta": 1e6, "rope_type": "default"}
        config = transformers.Qwen3Config(**{**SMALL, "rope_parameters": rope, **overrides})
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0.0, std)
                if "norm" in name:
                    parameter.add_(1.0)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return folder, model

    return make
