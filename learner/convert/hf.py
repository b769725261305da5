"""Reading and writing Hugging Face checkpoint folders for a `GPTModel`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from safetensors.torch import save_file

from learner.convert.held import Held, alone, by_share, named_tensors, whole_tensors
from learner.convert.names import hf_shapes, rules
from learner.convert.shares import pieces, shares
from learner.errors import ModelError
from learner.model.shape import Shape

COPIED_PATTERNS = ("config.json", "generation_config.json", "*token*", "vocab.*", "merges.txt", "*.jinja")
"""Files a checkpoint folder has beside its weights: architecture, tokenizer, chat template."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights, as the safetensors format names them."""


class HfFolder:
    """The tensors of `folder`/*.safetensors, read one by one when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Open every file. Raises `ModelError` if there is none or a tensor is stored twice."""
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name and shape of every tensor, before any is read."""
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt", device="cpu")
            for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
                if name in self.shapes:
                    raise ModelError(f"{path}: tensor {name} is stored twice; keep one copy of the weights")
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._files[name] = file
        if not self.shapes:
            raise ModelError(
                f"{folder}: no *.safetensors file; give a Hugging Face checkpoint folder with weights"
            )

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored. Raises `ModelError` for one that is not floating point."""
        found = self._files[name].get_slice(name).get_dtype()
        if found not in DTYPES:
            raise ModelError(
                f"{self.folder}: tensor {name}: got dtype {found}, expected {' or '.join(DTYPES)}"
            )
        return DTYPES[found]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored."""
        return self._files[name].get_tensor(name)


def load_hf(model: GPTModel, shape: Shape, folder: Path) -> None:
    """Load `folder`/*.safetensors into `model`: of each tensor the part that this rank holds.

    Tensors of which it holds nothing are not read. Tensors of multi-token prediction are checked and left
    alone: `save_hf` copies them. Raises `ModelError` naming the tensor when one is missing, unknown, stored
    twice or of another shape.
    """
    source = HfFolder(folder)
    check_coverage(source, shape)
    with torch.no_grad():
        unfilled = _fill_alone(model, shape, source) if alone() else _fill(model, shape, source)
    if unfilled:
        raise ModelError(
            f"{folder}: no rule fills {sorted(unfilled)} of the model; learner/convert/names.py needs one"
        )


def _fill_alone(model: GPTModel, shape: Shape, source: HfFolder) -> list[str]:
    """Fills a model that no other rank shares; the names of what no rule fills."""
    targets = named_tensors(model)
    for rule in rules(shape):
        parts = [source.tensor(part.name).float() for part in rule.parts]
        targets.pop(rule.mcore).copy_(rule.merge(parts))
    return list(targets)


def _fill(model: GPTModel, shape: Shape, source: HfFolder) -> list[str]:
    """Fills this rank's part of the model; the keys of what no rule fills."""
    held = Held(model)
    regions = by_share(held.tensors)
    for rule in rules(shape):
        if not any((share.key, share.expert) in regions for share in shares(rule, shape)):
            continue
        merged = rule.merge([source.tensor(part.name).float() for part in rule.parts])
        for share, piece in pieces(rule, shape, merged):
            for region in regions.get((share.key, share.expert), ()):
                held.tensors.pop(region).copy_(region.of(piece, share))
    return [region.key for region in held.tensors]


def export_hf(model: GPTModel, shape: Shape) -> dict[str, torch.Tensor]:
    """The trained weights under Hugging Face names: copies on the CPU, always in the same order.

    They have the dtype in which the model computes with them: bf16 in a bf16 model, but for what it keeps in
    fp32 (routers, `A_log`, `dt_bias`) and for gains that are shifted, which are exact in fp32 alone. A
    collective of all ranks that share the model: rank 0 gets all tensors, the others none.
    """
    tensors = {}
    for rule, merged in whole_tensors(model, shape):
        kind = torch.float32 if rule.shift else merged.dtype
        for part, tensor in zip(rule.parts, rule.split(merged.to(kind)), strict=True):
            tensors[part.name] = torch.empty(part.shape, dtype=kind).copy_(tensor)
    return tensors


def save_hf(tensors: dict[str, torch.Tensor], shape: Shape, folder: Path, source: Path) -> None:
    """Write exported `tensors` to `folder`, with what is not trained copied from `source`.

    That is config and tokenizer files, and, as they are stored, the tensors of multi-token prediction.
    """
    copy_files(source, folder)
    stored = HfFolder(source)
    carried = {name: stored.tensor(name) for name in hf_shapes(shape, mtp=True) if name in stored.shapes}
    save_file({**tensors, **carried}, folder / "model.safetensors", metadata={"format": "pt"})


def copy_files(source: Path, folder: Path) -> None:
    """Copy what `source` has beside its weights to `folder`, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED_PATTERNS:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def check_coverage(source: HfFolder, shape: Shape) -> None:
    """Raise `ModelError` unless `source` has exactly the tensors of `shape`, of the right shapes and kind.

    Those of multi-token prediction may be there, all of them, or not.
    """
    found = dict(source.shapes)
    expected = hf_shapes(shape)
    extra = hf_shapes(shape, mtp=True)
    if found.keys() & extra.keys():
        expected |= extra
    if shape.tied and found.pop("lm_head.weight", None):
        _check_tied(source)
    for name, dims in expected.items():
        got = found.pop(name, None)
        if got is None:
            raise ModelError(f"{source.folder}: tensor {name} is missing, expected shape {dims}")
        if got != dims:
            raise ModelError(
                f"{source.folder}: tensor {name}: got shape {got}, expected {dims} by config.json"
            )
        source.dtype(name)
    if found:
        raise ModelError(
            f"{source.folder}: unknown tensors {sorted(found)}; expected exactly those of a {shape.family} "
            "model of this config.json"
        )


def _check_tied(source: HfFolder) -> None:
    """Published tied checkpoints often store the shared matrix under both names."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if embedding in source.shapes and not torch.equal(source.tensor(head), source.tensor(embedding)):
        raise ModelError(
            f"{source.folder}: {head} differs from {embedding}, yet config.json says tie_word_embeddings; "
            f"set it to false or remove {head}"
        )
