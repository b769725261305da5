"""SGLang on a plain CPU: a platform plug-in for the stock server, without CUDA and without sgl-kernel.

SGLang finds `activate` through the entry-point group `sglang.srt.platforms` in every process that
imports it. It stands aside unless the process was started for this platform, which is said with
SGLang's own variable ``SGLANG_PLATFORM=slipstream_cpu``.

    serve      the server's main module, ``python -m actors.sglang_cpu.serve``
    platform   the platform: which memory pools, attention and sampling the server uses
    attention  batched attention over the paged key-value cache in plain torch
    linear_attention, delta_rule   gated DeltaNet over the pools of recurrent states, likewise
    sampling   sampling with a seed for each request
"""

from __future__ import annotations

import os

PLATFORM = "slipstream_cpu"
"""Name of the plug-in: its entry point, and the value of ``SGLANG_PLATFORM`` that asks for it."""


def activate() -> str | None:
    """The platform class's full name when this process was started for it, else None."""
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM:
        return None
    return "actors.sglang_cpu.platform.TorchCpuPlatform"
