"""The output layer by chunks against plain torch, alone and with the vocabulary on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.model.output import logits_of, logprobs_of, token_logprobs
from learner.packing import pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner import reference
from tests.unit.learner.conftest import SMALL
from tests.unit.learner.test_step import batch_of

N, H, V = 37, 8, 22

RANK = """
import sys, torch, torch.distributed as dist
from learner.model.cpu import stand_in_for_cuda
from tests.parallel.processes import leave
from tests.unit.learner import test_output
torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
stand_in_for_cuda()
for sequence_parallel in (False, True):
    for dtype in (torch.float64, torch.float32):
        test_output.check_rank(rank, dtype, sequence_parallel)
leave()
"""


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Hidden states, output layer, targets, temperatures, and upstream gradients of both results."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=source)
    temperature = torch.rand(N, generator=source, dtype=torch.float64).to(dtype) + 0.5
    upstream = torch.randn(2, N, generator=source, dtype=torch.float64).to(dtype)
    return hidden, weight, targets, temperature, upstream


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module under test computes, by torch's own operations on all logits."""
    logs = (torch.matmul(hidden, weight.t()) / temperature[:, None]).log_softmax(dim=-1)
    return logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(dim=-1)


def gradients(results: tuple[torch.Tensor, ...], upstream: torch.Tensor, *of: torch.Tensor) -> tuple:
    return torch.autograd.grad(sum((r * u).sum() for r, u in zip(results, upstream, strict=True)), of)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_chunks_give_what_plain_torch_does(chunk: int) -> None:
    hidden, weight, targets, temperature, upstream = tensors()
    expected = plain(hidden, weight, targets, temperature)
    got = token_logprobs(hidden, weight, targets, temperature, chunk=chunk, entropy_gradient=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    wanted = gradients(expected, upstream, hidden, weight)
    torch.testing.assert_close(gradients(got, upstream, hidden, weight), wanted, rtol=1e-11, atol=1e-12)


def test_values_have_the_bits_of_a_log_softmax_over_all() -> None:
    """As an engine computes them: what makes its log-probabilities equal the learner's."""
    hidden, weight, targets, temperature, _ = tensors(torch.float32)
    expected = plain(hidden, weight, targets, temperature)
    got = token_logprobs(hidden, weight, targets, temperature, chunk=N)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_closed_form_and_the_temperature() -> None:
    hidden, _, targets, temperature, _ = tensors()
    logs = reference.softmax_logs(hidden.detach().numpy(), temperature.numpy())
    targets = targets % H
    got, entropy = token_logprobs(hidden, torch.eye(H).double(), targets, temperature, chunk=10)
    np.testing.assert_allclose(got.detach().numpy(), logs[np.arange(N), targets], rtol=1e-6)
    np.testing.assert_allclose(entropy.numpy(), -(np.exp(logs) * logs).sum(axis=1), rtol=1e-6)
    got.sum().backward()
    closed = (np.eye(H)[targets] - np.exp(logs)) / temperature.numpy()[:, None]
    np.testing.assert_allclose(hidden.grad.numpy(), closed, rtol=1e-6, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    hidden, weight, targets, temperature, _ = tensors()

    def both(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(h, w, targets[:9], temperature[:9], chunk=4, entropy_gradient=True)

    assert torch.autograd.gradcheck(both, (hidden[:9], weight))


def test_the_entropy_has_a_gradient_only_when_asked() -> None:
    hidden, weight, targets, temperature, _ = tensors()
    for asked in (False, True):
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, temperature, chunk=10, entropy_gradient=asked
        )
        assert (logprobs.requires_grad, entropy.requires_grad) == (True, asked)
    with torch.no_grad():
        got = token_logprobs(hidden, weight, targets, temperature, chunk=10, entropy_gradient=True)
    assert not any(tensor.requires_grad for tensor in got)


def test_no_target_is_no_error() -> None:
    hidden, weight, targets, temperature, _ = tensors()
    got = token_logprobs(hidden[:0], weight, targets[:0], temperature[:0], chunk=10)
    assert [tensor.shape for tensor in got] == [(0,), (0,)]
    got[0].sum().backward()
    assert not weight.grad.any()


def test_bf16_layers_give_fp32_log_probabilities() -> None:
    hidden, weight, targets, temperature, upstream = tensors(torch.float32)
    small = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    got = token_logprobs(*small, targets, temperature, chunk=10, entropy_gradient=True)
    assert {tensor.dtype for tensor in got} == {torch.float32}
    logits = (small[0] @ small[1].t()).float() / temperature[:, None]
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got[0], expected)
    wanted = gradients(plain(hidden, weight, targets, temperature), upstream, hidden, weight)
    for gradient, right in zip(gradients(got, upstream, *small), wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - right).norm() <= 0.02 * right.norm()


class Peak(TorchDispatchMode):
    """Within it `most` is the largest number of bytes that tensors made within it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.live.values()))
        return result


def peak_bytes(chunk: int) -> int:
    """Of forward and backward passes of 512 targets over a vocabulary of 4,096."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, H, generator=source, requires_grad=True)
    weight = torch.randn(4096, H, generator=source, requires_grad=True)
    targets, temperature = torch.randint(4096, (512,), generator=source), torch.ones(512)
    with Peak() as peak:
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, temperature, chunk=chunk, entropy_gradient=True
        )
        (logprobs.sum() + entropy.sum()).backward()
    return peak.most


def test_logits_are_never_in_memory_at_once() -> None:
    all_logits, gradient = 512 * 4096 * 4, 4096 * H * 4
    assert peak_bytes(512) > 2 * all_logits
    assert peak_bytes(32) < 4 * all_logits / 16 + 3 * gradient < all_logits / 2


class Rows(TorchDispatchMode):
    """Within it `most` is the largest number of rows of a product as wide as the vocabulary."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.size(1) == SMALL["vocab_size"]:
            self.most = max(self.most, result.size(0))
        return result


def test_a_step_holds_no_more_logits_than_it_was_told(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    groups, found = batch_of(0), []
    for chunk in (4, 1000):
        model = ModelConfig(path=str(folder), micro_batch_tokens=1000, logits_chunk=chunk)
        trainer = Trainer(folder, model, OptimizerConfig(), ObjectiveConfig(entropy=0.01))
        for act in (lambda t: t.score([range(40)]), lambda t: found.append(t.train_step(groups, 0))):
            with Rows() as rows:
                act(trainer)
            assert rows.most == 4 if chunk == 4 else rows.most >= 39
    for name in ("loss", "grad_norm", "entropy"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def check_rank(rank: int, dtype: torch.dtype, sequence_parallel: bool) -> None:
    """What one of two ranks, with half of the vocabulary each, must find; runs in a process of its own."""
    hidden, weight, _, temperature, upstream = tensors(dtype)
    source = np.random.default_rng(0)
    rows = [row_of_tokens(source.integers(0, V, n).tolist(), n // 2) for n in (9, 21, 11)]
    (batch,) = pack(rows, 100)  # 38 tokens
    states = torch.cat([hidden, hidden[:1]]).detach().requires_grad_()
    batch.temperature.copy_(temperature[: len(batch.targets)])
    count = len(batch.targets)
    expected = plain(states[batch.predictors], weight, batch.targets, temperature[:count])
    wanted = gradients(expected, upstream[:, :count], states, weight)

    half = slice(rank * V // 2, (rank + 1) * V // 2)
    places = slice(rank * 19, (rank + 1) * 19) if sequence_parallel else slice(None)
    mine, shard = states.detach()[places, None].requires_grad_(), weight.detach()[half].requires_grad_()
    layer = SimpleNamespace(tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel, weight=shard)
    batch = SimpleNamespace(**{**vars(batch), "temperature": temperature[:count]})
    got = logprobs_of(mine, layer, None, batch, chunk=5, entropy_gradient=True)
    close = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, expected, **close)
    found = gradients(got, upstream[:, :count], mine, shard)
    torch.testing.assert_close(found[0].squeeze(1), wanted[0][places], **close)
    torch.testing.assert_close(found[1], wanted[1][half], **close)
    whole = states.detach()[batch.predictors] @ weight.detach().t()
    torch.testing.assert_close(logits_of(mine, layer, None, batch), whole, **close)


def test_two_ranks_share_the_vocabulary(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[3],
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
