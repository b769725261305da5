"""The loader inside an engine: a fused layout filled by names once and by plan later, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from weightsync import loader
from weightsync.checksum import sums
from weightsync.cuda import visible_cards
from weightsync.errors import SourceError
from weightsync.image import Image, write_image
from weightsync.loader import layout_of, load
from weightsync.manifest import Manifest, encode_manifest
from weightsync.ticket import FOLDER, Report, Ticket, hand_in, reports

Weights = Iterable[tuple[str, torch.Tensor]]


class Fused(torch.nn.Module):
    """Keeps weights as SGLang does: projections fused, experts stacked, bf16, a rank's shard, padded rows."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self._rank = rank
        self.qkv = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.bfloat16), requires_grad=False)
        self.w13 = torch.nn.Parameter(torch.zeros(2, 8, 8), requires_grad=False)
        self.embed_tokens = torch.nn.Parameter(torch.zeros(16, 4), requires_grad=False)

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if name in "qkv":
                row = 4 * "qkv".index(name)
                self.qkv.data[row : row + 4].copy_(tensor)
            elif name == "embed":
                self.embed_tokens.data[:10].copy_(tensor.narrow(1, 4 * self._rank, 4))
                self.embed_tokens.data[10:].fill_(0)
            else:
                self.w13.data[int(name[1])].narrow(0, 4 * name.endswith("up"), 4).copy_(tensor.t())


class Moving(Fused):
    """Brings each tensor to its own type first, as others do to their device, and takes a part of it."""

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if name in "qkv":
                row, own = 4 * "qkv".index(name), tensor.to(torch.bfloat16)
                self.qkv.data[row : row + 2].copy_(own[:2])
                self.qkv.data[row + 2 : row + 4].copy_(own.narrow(0, 2, 2))
            else:
                super().load_weights([(name, tensor.clone())])


class Plus(Fused):
    """Keeps a gain plus one in a buffer, as SGLang does for norms that are centred at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("plus", torch.zeros(12, 8, dtype=torch.bfloat16), persistent=False)

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        torch.add(self.qkv.data, 1.0, out=self.plus)


class PlusInPlace(Plus):
    """The same in two steps, as SGLang 0.5.23 does it."""

    def load_weights(self, weights: Weights) -> None:
        Fused.load_weights(self, weights)
        self.plus.copy_(self.qkv.data).add_(1.0)


class Accumulating(Plus):
    """Adds to what its buffer held before."""

    def load_weights(self, weights: Weights) -> None:
        Fused.load_weights(self, weights)
        self.plus.add_(self.qkv.data)


class Mixing(Plus):
    """Fills its buffer from the weights, and then from elsewhere."""

    def load_weights(self, weights: Weights) -> None:
        Fused.load_weights(self, weights)
        self.plus.copy_(self.qkv.data).add_(torch.ones(12, 8, dtype=torch.bfloat16))


class Filling(Plus):
    """Fills half of its buffer, and then changes all of it."""

    def load_weights(self, weights: Weights) -> None:
        Fused.load_weights(self, weights)
        self.plus[:6].copy_(self.qkv.data[:6])
        self.plus.add_(self.qkv.data)


class Foreign(Fused):
    """Fills a part from a table of its own."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.embed_tokens.data[:10].copy_(torch.ones(10, 4))


class Scaling(Fused):
    """Computes on the way: its loading cannot be repeated by copies."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights((name, tensor * 2 if name == "q" else tensor) for name, tensor in weights)


class Deriving(Fused):
    """Derives a tensor of its own from what was loaded."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.derived = self.qkv.float() * 2


class Hooked(Fused):
    """Has the hook by which SGLang's models derive tensors, here outside of loading."""

    def post_load_weights(self) -> None:
        raise NotImplementedError


class Failing(Fused):
    """Fails in the middle."""

    def load_weights(self, weights: Weights) -> None:
        for number, one in enumerate(weights):
            if number == 2:
                raise KeyError(one[0])
            super().load_weights([one])


def exported(seed: int, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    experts = {f"e{n}{part}": torch.randn(8, 4, generator=draw) for n in range(2) for part in ("gate", "up")}
    projections = {name: torch.randn(4, 8, generator=draw) for name in "qkv"}
    return {**projections, "embed": torch.randn(10, 8, generator=draw), **experts, **changes}


def is_loaded(model: Fused, weights: dict[str, torch.Tensor], rank: int = 0) -> bool:
    qkv = torch.cat([weights[name] for name in "qkv"]).bfloat16()
    experts = torch.stack([torch.cat([weights[f"e{n}gate"].t(), weights[f"e{n}up"].t()]) for n in range(2)])
    embed = weights["embed"][:, 4 * rank : 4 * rank + 4]
    same = torch.equal(model.qkv, qkv) and torch.equal(model.w13, experts)
    return same and torch.equal(model.embed_tokens[:10], embed) and not model.embed_tokens[10:].any()


Obey = Callable[..., Report]


@pytest.fixture
def obey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Obey:
    """Has a model load exported weights; the report. `spoil` makes another image of the right one."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    numbers = iter(range(100))

    def do(
        model: Fused, weights: dict[str, torch.Tensor], spoil: Callable[[Image], Image] = lambda image: image
    ) -> Report:
        number = next(numbers)
        image, manifest = write_image(Manifest.of(number, weights), weights, 64)
        hand_in(tmp_path, Ticket(number, spoil(image).path, encode_manifest(manifest), check=True))
        load(model, [])
        (report,) = reports(tmp_path, number)
        return report

    return do


@pytest.mark.parametrize("rank", [0, 1])
def test_names_once_and_the_plan_from_then_on(obey: Obey, rank: int) -> None:
    model = Fused(rank)
    ways = []
    for seed in range(3):
        report = obey(model, exported(seed))
        assert not report.problem
        assert is_loaded(model, exported(seed), rank)
        ways.append(report.way)
        assert (report.copies, report.tensors, report.pid) == (3, 3, os.getpid())
        assert report.layout == layout_of(model)
    assert ways == ["names", "plan", "plan"]


def test_a_tensor_that_goes_elsewhere_first_is_followed(obey: Obey) -> None:
    model = Moving()
    for seed, way in ((0, "names"), (1, "plan"), (2, "plan")):
        report = obey(model, exported(seed))
        assert (report.problem, report.reason, report.way) == ("", "", way)
        assert is_loaded(model, exported(seed))


@pytest.mark.parametrize("kind", [Plus, PlusInPlace])
def test_a_buffer_that_is_computed_from_weights_follows_them(obey: Obey, kind: type[Plus]) -> None:
    model = kind()
    for seed, way in ((0, "names"), (1, "plan"), (2, "plan")):
        report = obey(model, exported(seed))
        assert (report.problem, report.reason, report.way) == ("", "", way)
        assert is_loaded(model, exported(seed))
        assert torch.equal(model.plus, model.qkv + 1)


def test_another_layout_makes_another_plan(obey: Obey) -> None:
    model = Fused()
    obey(model, exported(0))
    half = {name: tensor.bfloat16() for name, tensor in exported(1).items()}
    assert obey(model, half).way == "names"
    assert is_loaded(model, {name: tensor.float() for name, tensor in half.items()})


def test_a_plan_is_void_where_the_engine_has_moved_its_tensors(obey: Obey) -> None:
    model = Fused()
    obey(model, exported(0))
    old = model.w13.data
    model.w13.data = torch.zeros_like(old)
    assert obey(model, exported(1)).way == "names"
    assert is_loaded(model, exported(1))


class Clearing(Fused):
    """Puts a constant where it has just copied."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.qkv.data[:4].fill_(1)


@pytest.mark.parametrize(
    "kind", [Scaling, Deriving, Hooked, Clearing, Foreign, Accumulating, Mixing, Filling]
)
def test_loading_that_does_more_than_copy_is_never_planned(obey: Obey, kind: type[Fused]) -> None:
    model = kind()
    for seed in range(2):
        report = obey(model, exported(seed))
        assert (report.problem, report.way) == ("", "names")
        assert report.reason
    expected = {Scaling: 2 * exported(1)["q"], Clearing: torch.ones(4, 8)}.get(kind, exported(1)["q"])
    assert torch.equal(model.qkv[:4], expected.bfloat16())
    if isinstance(model, Deriving):
        assert torch.equal(model.derived, model.qkv.float() * 2)


def test_a_tensor_that_nothing_fills_is_named(obey: Obey) -> None:
    weights = exported(0)
    del weights["k"]
    report = obey(Fused(), weights)
    assert "qkv (64 of 96 elements filled)" in report.problem
    assert report.touched


@pytest.mark.parametrize("what", ["unsealed", "gone", "other size"])
def test_an_image_that_cannot_be_trusted_leaves_the_engine_as_it_was(obey: Obey, what: str) -> None:
    model = Fused()
    obey(model, exported(0))

    def spoil(image: Image) -> Image:
        if what == "gone":
            other = Image(99999, image.size)
        else:
            other = Image.allocate(image.size - (what == "other size"))
            if what == "other size":
                other.seal()
        kept.append(other)
        return other

    kept: list[Image] = []
    report = obey(model, exported(1), spoil)
    assert "SourceError" in report.problem
    assert not report.touched
    assert is_loaded(model, exported(0))


@pytest.mark.skipif(bool(visible_cards()), reason="there is a GPU")
def test_a_version_on_a_gpu_is_refused_untouched_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    weights = exported(0)
    _, manifest = write_image(Manifest.of(0, weights), weights, 64)
    hand_in(tmp_path, Ticket(0, "/proc/self/fd/0", encode_manifest(manifest), check=True, gpu=True))
    load(Fused(), [])
    (report,) = reports(tmp_path, 0)
    assert "NoCuda: no CUDA" in report.problem
    assert not report.touched


@pytest.mark.parametrize(
    ("what", "problem", "touched"),
    [("whole", "", False), ("damaged", "chunk 2 of", False), ("owner ends", "owner ended", True)],
)
def test_a_slot_is_verified_before_and_its_owner_after_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, problem: str, touched: bool
) -> None:
    """The slot is in host memory here: what the loader makes of one does not depend on where it lies."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    model, weights = Fused(), exported(1)
    image, manifest = write_image(Manifest.of(1, weights), weights, 64)
    memory = torch.frombuffer(image.private(), dtype=torch.uint8)
    found = zip(manifest.chunks, sums(memory, manifest.chunks), strict=True)
    manifest = replace(manifest, chunks=[replace(chunk, sum=one) for chunk, one in found])
    if what == "damaged":
        memory[2 * 64 + 9] ^= 1

    @contextmanager
    def opened(guard: str, wanted: Manifest) -> Iterator[torch.Tensor]:
        assert (guard, wanted) == ("/the/guard", manifest)
        yield memory
        if what == "owner ends":
            raise SourceError("owner ended")

    monkeypatch.setattr(loader, "opened", opened)
    hand_in(tmp_path, Ticket(1, "/the/guard", encode_manifest(manifest), check=True, gpu=True))
    load(model, [])
    (report,) = reports(tmp_path, 1)
    assert problem in report.problem
    assert (report.touched, bool(report.problem)) == (touched, bool(problem))
    assert is_loaded(model, weights) == (what != "damaged")
    assert bool(model.qkv.any()) == (what != "damaged")


def test_loading_that_fails_half_way_is_reported_as_touched_and_raises_nothing(obey: Obey) -> None:
    report = obey(Failing(), exported(0))
    assert "KeyError" in report.problem
    assert report.touched


def test_a_copy_that_went_wrong_is_seen(obey: Obey, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fused()
    obey(model, exported(0))
    plan = model.slipstream_plan
    plan.copy = lambda image: [copy.target.copy_(copy.source(image)) for copy in plan.copies[1:]]
    report = obey(model, exported(1))
    assert "1 of 3 copies are not what was staged" in report.problem
    assert report.touched


def test_without_a_ticket_there_is_a_report_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    load(Fused(), [])
    (report,) = reports(tmp_path, -1)
    assert "ticket" in report.problem
    assert not report.touched


def test_a_report_on_an_earlier_ticket_is_no_answer(tmp_path: Path, obey: Obey) -> None:
    obey(Fused(), exported(0))
    assert len(reports(tmp_path, 0)) == 1
    assert reports(tmp_path, 1) == []
