"""Packed micro-batches are faster than padded ones, and the chunked output layer needs less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("model", ["dense", "next"])
def test_packing_and_chunks_pay(model: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_learner", "--json", "--models", model]
    command += ["--untuned"] if model == "next" else []
    # The other tests of this folder want exact products.
    environment = {name: value for name, value in os.environ.items() if name != "NVIDIA_TF32_OVERRIDE"}
    answer = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    found = json.loads(answer.stdout.splitlines()[-1])
    figures = found["models"][model]
    print(f"\n{model} on {found['card']}: {figures}")
    assert figures["packed_tokens_per_s"] > 1.3 * figures["padded_tokens_per_s"]
    # Logits of 16,384 targets over 151,936 tokens in fp32 are 10 GB.
    assert figures["one_batch_peak_gb"] < figures["one_batch_unchunked_peak_gb"] - 10
