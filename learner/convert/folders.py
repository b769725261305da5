"""A Hugging Face folder to a distributed checkpoint of Megatron-Core and back, one tensor at a time.

Each layer is a file of its own, which appears under its name when it is whole: a conversion that
was interrupted goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

from learner.convert.dist_checkpoint import DistCheckpoint, Piece, write_checkpoint_index, write_pieces
from learner.convert.hf import HfFolder, check_coverage, copy_files
from learner.convert.names import hf_shapes, mtp_rules, rules
from learner.convert.rule import Rule
from learner.convert.shares import pieces, shares
from learner.convert.stream import write_safetensors
from learner.errors import ModelError
from learner.model.hf_config import read_shape
from learner.model.shape import Shape

Report = Callable[[int, int], None]
"""Called with the files that are done and all files."""


def hf_to_mcore(source: Path, out: Path, report: Report) -> None:
    """Convert the checkpoint folder `source` to a distributed checkpoint in `out`.

    Tensors keep their dtype, but for gains that are shifted, which are stored in fp32. Raises
    `ModelError` for a folder that does not fit its config.json, or an `out` with something else in it.
    """
    shape, stored = read_shape(source), HfFolder(source)
    check_coverage(stored, shape)
    plan = _files(shape, stored)
    _claim(out, [source])
    pieces: list[Piece] = []
    for number, members in enumerate(plan):
        name = f"__{number}_0.distcp"
        index = out / f"{name}.json"
        if not index.exists():
            part = out / name
            found = write_pieces(part, _merged(members, shape, stored))
            _sync(part)
            _write(index, msgspec.json.encode(found))
        pieces += msgspec.json.decode(index.read_bytes(), type=list[Piece])
        report(number + 1, len(plan))
    write_checkpoint_index(out, pieces)
    for number in range(len(plan)):
        (out / f"__{number}_0.distcp.json").unlink()
    (out / CLAIM).unlink()


def mcore_to_hf(source: Path, like: Path, out: Path, report: Report) -> None:
    """Convert the distributed checkpoint `source` to a Hugging Face folder in `out`.

    `like` is a checkpoint folder of the same model: config, tokenizer and dtypes are taken from it,
    and so are tensors of multi-token prediction if `source` has none. Raises `ModelError` for a key
    that is missing or of another shape, or an `out` with something else in it.
    """
    shape, model = read_shape(like), HfFolder(like)
    check_coverage(model, shape)
    stored = DistCheckpoint(source)
    plan = _files(shape, model)
    _check_keys(plan, shape, stored)
    _claim(out, [source, like])
    where: dict[str, str] = {}
    for number, members in enumerate(plan):
        name = f"model-{number + 1:05}-of-{len(plan):05}.safetensors"
        parts = [part for rule in members for part in rule.parts]
        if not (out / name).exists():
            layout = {part.name: (model.dtype(part.name), part.shape) for part in parts}
            temporary = out / f"{name}.part"
            write_safetensors(temporary, layout, _split(members, shape, stored, model))
            _sync(temporary)
            temporary.rename(out / name)
        where |= {part.name: name for part in parts}
        report(number + 1, len(plan))
    written = [part for members in plan for rule in members for part in rule.parts]
    total = sum(part.size * model.dtype(part.name).itemsize for part in written)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    (out / "model.safetensors.index.json").write_text(text + "\n")
    copy_files(like, out)
    (out / CLAIM).unlink()


CLAIM = "conversion.json"
"""The file by which an unfinished conversion is known; it is gone when all is done."""


def _claim(out: Path, sources: list[Path]) -> None:
    """Take `out` for a conversion of these folders as they are now, or for going on with it."""
    files = [path for source in sources for path in sorted(source.resolve().iterdir())]
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    claim = out / CLAIM
    if claim.exists() and claim.read_text() != digest:
        raise ModelError(
            f"{out}: holds a part of another conversion, or of a source that has changed; remove the folder"
        )
    if not claim.exists():
        if any(out.iterdir()):
            raise ModelError(f"{out}: not empty; give a new folder")
        _write(claim, digest.encode())


def _files(shape: Shape, stored: HfFolder) -> list[list[Rule]]:
    """The rules of each file: one file a layer, one for multi-token prediction, one for the rest."""
    groups: dict[str, list[Rule]] = {}
    extra = mtp_rules(shape) if stored.shapes.keys() & hf_shapes(shape, mtp=True).keys() else ()
    for rule in (*rules(shape), *extra):
        layer = re.match(r"decoder\.layers\.\d+\.|mtp\.", rule.mcore)
        groups.setdefault(layer[0] if layer else "", []).append(rule)
    return list(groups.values())


def _merged(
    members: list[Rule], shape: Shape, stored: HfFolder
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Key, shape, start and values of every piece of the tensors of `members`."""
    for rule in members:
        parts = [stored.tensor(part.name) for part in rule.parts]
        merged = rule.merge([part.float() if rule.shift else part for part in parts])
        for share, piece in pieces(rule, shape, merged):
            yield share.key, share.shape, share.start, piece


def _split(
    members: list[Rule], shape: Shape, stored: DistCheckpoint, model: HfFolder
) -> Iterator[torch.Tensor]:
    """Hugging Face tensors of `members`, in the order of their parts."""
    for rule in members:
        wanted = shares(rule, shape)
        if wanted[0].key not in stored.shapes:  # multi-token prediction, which no learner trains
            yield from (model.tensor(part.name) for part in rule.parts)
            continue
        pieces = [stored.read(share.key, share.start, share.size) for share in wanted]
        merged = torch.cat([piece.view(-1, *rule.shape[1:]) for piece in pieces])
        yield from rule.split(merged.float() if rule.shift else merged)


def _check_keys(plan: list[list[Rule]], shape: Shape, stored: DistCheckpoint) -> None:
    for members in plan:
        for rule in members:
            for share in shares(rule, shape):
                got = stored.shapes.get(share.key)
                if got is None and rule.mcore.startswith("mtp."):
                    continue
                if got != share.shape:
                    raise ModelError(f"{stored.folder}: {share.key}: got shape {got}, expected {share.shape}")


def _write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.rename(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
