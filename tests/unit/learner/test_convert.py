"""Folders converted both ways: bit by bit, through Megatron-Core's own reader, after interruptions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors.torch import load_file, save_file

from learner.convert import folders
from learner.convert.dist_checkpoint import DistCheckpoint, Piece, write_checkpoint_index, write_pieces
from learner.convert.folders import CLAIM, hf_to_mcore, mcore_to_hf
from learner.convert.hf import HfFolder, load_hf
from learner.errors import ModelError
from learner.model.build import build_model
from learner.model.hf_config import read_shape
from tests.unit.learner.families import CASES, make_family
from tests.unit.learner.test_families import make_trainer
from tests.unit.learner.test_names import _add_mtp


def quiet(_done: int, _total: int) -> None:
    pass


def as_published(folder: Path) -> None:
    """Store all but decays in bf16, and add multi-token prediction where the family has it.

    The gain that is shifted spreads so far that bf16 could not shift it there and back.
    """
    path = folder / "model.safetensors"
    tensors = {name: t if name.endswith("A_log") else t.bfloat16() for name, t in load_file(path).items()}
    for name, tensor in tensors.items():
        if name.endswith("linear_attn.norm.weight"):
            tensor.copy_(torch.linspace(-3, 3, len(tensor)))
    save_file(tensors, path)
    _add_mtp(folder)


@pytest.fixture(params=list(CASES))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_family(request.param, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    return tmp_path / "hf"


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = HfFolder(one), HfFolder(other)
    assert first.shapes == second.shapes
    for name in first.shapes:
        assert first.dtype(name) == second.dtype(name), name
        assert torch.equal(first.tensor(name), second.tensor(name)), name


@pytest.mark.parametrize("published", [False, True], ids=["fp32", "bf16"])
def test_there_and_back_keeps_every_bit(source: Path, tmp_path: Path, published: bool) -> None:
    if published:
        as_published(source)
    seen: list[tuple[int, int]] = []
    hf_to_mcore(source, tmp_path / "mcore", lambda *progress: seen.append(progress))
    mcore_to_hf(tmp_path / "mcore", source, tmp_path / "back", quiet)
    assert_same_weights(source, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == HfFolder(source).shapes.keys()
    assert not [path for folder in ("mcore", "back") for path in (tmp_path / folder).glob(f"*{CLAIM}*")]


@pytest.mark.filterwarnings("ignore")  # torch deprecates much of what Megatron-Core's reader calls
def test_megatron_core_reads_the_checkpoint(source: Path, tmp_path: Path) -> None:
    shape = read_shape(source)
    hf_to_mcore(source, tmp_path / "mcore", quiet)
    wanted, got = build_model(shape), build_model(shape)
    load_hf(wanted, shape, source)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = got.sharded_state_dict(metadata={"dp_cp_group": group, "non_homogeneous_layers": True})
    sharded = {name: value for name, value in sharded.items() if not isinstance(value, ShardedObject)}
    loaded = dist_checkpointing.load(sharded, str(tmp_path / "mcore"))
    tensors = {n: t for n, t in wanted.state_dict().items() if isinstance(t, torch.Tensor)}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.filterwarnings("ignore")
def test_what_megatron_core_saved_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family("qwen3_next", tmp_path / "hf")
    shape = read_shape(tmp_path / "hf")
    model = build_model(shape)
    load_hf(model, shape, tmp_path / "hf")
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": group, "non_homogeneous_layers": True})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (tmp_path / "mcore").mkdir()
    dist_checkpointing.save(sharded, str(tmp_path / "mcore"))
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", tmp_path / "back", quiet)
    assert_same_weights(tmp_path / "hf", tmp_path / "back")


def test_transformers_reads_what_comes_back(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf_to_mcore(source, tmp_path / "mcore", quiet)
    mcore_to_hf(tmp_path / "mcore", source, tmp_path / "back", quiet)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())


def test_a_piece_is_stored_without_the_tensor_that_it_is_a_view_of(tmp_path: Path) -> None:
    view = torch.zeros(100, 1000)[7:8]
    (piece,) = write_pieces(tmp_path / "file", iter([("key", (1, 1000), (0, 0), view)]))
    assert piece.length == (tmp_path / "file").stat().st_size < 6000


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    make_family("qwen3_next", tmp_path / "hf")
    return tmp_path / "hf"


def _halves(folder: Path) -> None:
    """Rewrite a checkpoint as two ranks of tensor and expert parallelism would have saved it."""
    whole = DistCheckpoint(folder)
    pieces: list[Piece] = []
    for rank in (0, 1):

        def shard(rank: int = rank) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
            for key, shape in whole.shapes.items():
                middle = shape[0] // 2
                first, rows = (0, middle) if rank == 0 else (middle, shape[0] - middle)
                start = (first, *[0] * len(shape[1:]))
                yield key, shape, start, whole.read(key, start, (rows, *shape[1:]))

        pieces += write_pieces(folder / f"__{rank}_9.distcp", shard())
    write_checkpoint_index(folder, pieces)


def test_shards_of_several_ranks_are_put_together(source: Path, tmp_path: Path) -> None:
    hf_to_mcore(source, tmp_path / "mcore", quiet)
    _halves(tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", source, tmp_path / "back", quiet)
    assert_same_weights(source, tmp_path / "back")


def test_trained_weights_come_back_in_the_dtypes_of_the_first_checkpoint(
    hybrid: Path, tmp_path: Path
) -> None:
    hf_to_mcore(hybrid, tmp_path / "mcore", quiet)
    fp32 = {name: HfFolder(hybrid).tensor(name) for name in HfFolder(hybrid).shapes}
    as_published(hybrid)  # multi-token prediction as well, which the fp32 checkpoint lacks
    mcore_to_hf(tmp_path / "mcore", hybrid, tmp_path / "back", quiet)
    back, like = HfFolder(tmp_path / "back"), HfFolder(hybrid)
    assert back.shapes == like.shapes
    for name in back.shapes:
        wanted = fp32[name].to(like.dtype(name)) if name in fp32 else like.tensor(name)
        assert torch.equal(back.tensor(name), wanted), name


@pytest.mark.parametrize("direction", ["mcore", "hf"])
def test_an_interrupted_conversion_goes_on(hybrid: Path, tmp_path: Path, direction: str) -> None:
    hf_to_mcore(hybrid, tmp_path / "mcore", quiet)

    def convert(out: str, report: folders.Report) -> None:
        if direction == "mcore":
            hf_to_mcore(hybrid, tmp_path / out, report)
        else:
            mcore_to_hf(tmp_path / "mcore", hybrid, tmp_path / out, report)

    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("torn", stop)
    pattern = "__*_0.distcp" if direction == "mcore" else "*.safetensors"
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "torn").glob(pattern)}
    assert len(done) == 3
    torn = (
        tmp_path
        / "torn"
        / ("__3_0.distcp" if direction == "mcore" else "model-00004-of-00005.safetensors.part")
    )
    torn.write_bytes(b"half a file")
    config = hybrid / "config.json"
    stamp = config.stat()
    os.utime(config, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(ModelError, match="or of a source that has changed"):
        convert("torn", quiet)
    os.utime(config, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    convert("torn", quiet)
    convert("whole", quiet)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("torn", "whole")
    )
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first)


def test_a_folder_in_use_is_left_alone(hybrid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="out: not empty; give a new folder"):
        hf_to_mcore(hybrid, out, quiet)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").rename(out / CLAIM)
    with pytest.raises(ModelError, match="holds a part of another conversion"):
        hf_to_mcore(hybrid, out, quiet)


def test_a_checkpoint_that_lacks_something_is_refused_by_key(hybrid: Path, tmp_path: Path) -> None:
    mcore, key = tmp_path / "mcore", "decoder.layers.0.self_attention.in_proj.weight.z"
    with pytest.raises(ModelError, match=r"hf/\.metadata: no such file"):
        mcore_to_hf(hybrid, hybrid, tmp_path / "back", quiet)
    hf_to_mcore(hybrid, mcore, quiet)
    whole = DistCheckpoint(mcore)
    tensors = {name: whole.read(name, (0,) * len(dims), dims) for name, dims in whole.shapes.items()}

    def rewrite(change: dict[str, tuple[tuple[int, ...], torch.Tensor] | None]) -> None:
        stored = {name: (tuple(tensor.shape), tensor) for name, tensor in tensors.items()} | change
        pieces = (
            (name, entry[0], (0,) * entry[1].dim(), entry[1]) for name, entry in stored.items() if entry
        )
        write_checkpoint_index(mcore, write_pieces(mcore / "__0_9.distcp", pieces))

    rewrite({key: None})
    with pytest.raises(ModelError, match=rf"{key}: got shape None, expected \(72, 32\)"):
        mcore_to_hf(mcore, hybrid, tmp_path / "back", quiet)
    rewrite({key: ((36, 32), tensors[key][:36])})
    with pytest.raises(ModelError, match=rf"{key}: got shape \(36, 32\), expected \(72, 32\)"):
        mcore_to_hf(mcore, hybrid, tmp_path / "back", quiet)
    rewrite({key: ((72, 32), tensors[key][:36])})
    with pytest.raises(ModelError, match=rf"{key}: got 1152 of 2304 elements .* the shards of some rank"):
        mcore_to_hf(mcore, hybrid, tmp_path / "back", quiet)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", "it asks for os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
        (b"ctorch\nload\n(S'x'\ntR.", "it asks for torch.load"),
        (b"half an index", "not the index of a distributed checkpoint"),
        (b"", "Ran out of input"),
        (b"}.", "got a dict, expected the index"),
    ],
)
def test_an_index_that_is_none_runs_no_code(
    content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ModelError, match=said):
        DistCheckpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".metadata"]


def test_a_damaged_source_is_refused_before_anything_is_written(hybrid: Path, tmp_path: Path) -> None:
    tensors = load_file(hybrid / "model.safetensors")
    del tensors["model.layers.2.linear_attn.A_log"]
    save_file(tensors, hybrid / "model.safetensors")
    with pytest.raises(ModelError, match=r"linear_attn\.A_log is missing"):
        hf_to_mcore(hybrid, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_whole_numbers_are_not_weights(hybrid: Path, tmp_path: Path) -> None:
    hf_to_mcore(hybrid, tmp_path / "mcore", quiet)
    tensors = load_file(hybrid / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, hybrid / "model.safetensors")
    said = r"model\.norm\.weight: got dtype I8, expected F32 or BF16 or F16"
    with pytest.raises(ModelError, match=said):
        mcore_to_hf(tmp_path / "mcore", hybrid, tmp_path / "back", quiet)
    with pytest.raises(ModelError, match=said):
        hf_to_mcore(hybrid, tmp_path / "other", quiet)
    with pytest.raises(ModelError, match=said):
        make_trainer(hybrid)
