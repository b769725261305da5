"""`launch convert` as a command: there and back, and how much memory it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from launch.cli import main
from launch.tiny_model import make_tiny_qwen3


def test_there_and_back_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, mcore, back = (tmp_path / name for name in ("model", "mcore", "back"))
    assert main(["model", "--family", "qwen3_next", "--out", str(model)]) == 0
    assert main(["convert", "hf-to-mcore", str(model), "--out", str(mcore)]) == 0
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1] == str(mcore)
    assert printed.err.splitlines()[-1] == "3/3 files"
    assert main(["convert", "mcore-to-hf", str(mcore), "--like", str(model), "--out", str(back)]) == 0
    written = load_file(model / "model.safetensors")
    read = {name: t for path in back.glob("*.safetensors") for name, t in load_file(path).items()}
    assert written.keys() == read.keys()
    assert all(np.array_equal(written[name], read[name]) for name in written)


PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from learner.convert.folders import hf_to_mcore, mcore_to_hf

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

start, peak, done = anonymous(), [0], threading.Event()
threading.Thread(target=watch, daemon=True).start()
model, mcore, back = map(Path, sys.argv[1:4])
began = time.monotonic()
if sys.argv[4] == "mcore":
    hf_to_mcore(model, mcore, lambda *_: None)
else:
    mcore_to_hf(mcore, model, back, lambda *_: None)
done.set()
print(json.dumps([max(peak[0], anonymous()) - start, time.monotonic() - began]))
"""


@pytest.mark.accept
def test_a_conversion_needs_the_memory_of_a_layer(tmp_path: Path) -> None:
    """2.2 GB in 16 layers: at most twice the largest layer and 256 MB, beside what imports take."""
    model = make_tiny_qwen3(
        tmp_path / "model", seed=0, hidden=1536, layers=16, heads=12, head_dim=128, intermediate=6144
    )
    size = (model / "model.safetensors").stat().st_size
    assert size > 2e9
    limit = 2 * size / 16 + 256e6
    for direction in ("mcore", "hf"):
        argv = [
            sys.executable,
            "-c",
            PROGRAM,
            *(str(tmp_path / n) for n in ("model", "mcore", "back")),
            direction,
        ]
        output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        peak, seconds = json.loads(output)
        print(f"to {direction}: {size / 1e9:.2f} GB, {peak / 1e6:.0f} MB, {seconds:.1f} s")
        assert peak < limit
