"""Where SGLang keeps what its routers chose, in plain memory: pinned memory takes CUDA."""

from __future__ import annotations

import torch
from sglang.srt.state_capturer.base import BaseHostCache


class PageableHostCache(BaseHostCache):
    """SGLang's own, but for the kind of memory: for each place in the cache the experts of every layer."""

    def __init__(
        self, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "cpu"
    ) -> None:
        """`num_tokens` places, with the `topk_size` chosen experts of each of `num_layers` layers; `device`,
        which SGLang 0.5.23 says, is where the model is."""
        self.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
        self.num_tokens, self.num_layers, self.topk_size, self.name = num_tokens, num_layers, topk_size, name
