"""Reading and writing Hugging Face checkpoint folders for a `GPTModel`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from safetensors.torch import save_file

from learner.convert.names import hf_shapes, rules
from learner.errors import ModelError
from learner.model.hf_config import Qwen3Shape

COPIED_PATTERNS = ("config.json", "generation_config.json", "*token*", "vocab.*", "merges.txt", "*.jinja")
"""Files a checkpoint folder has beside its weights: architecture, tokenizer, chat template."""


def load_hf(model: GPTModel, shape: Qwen3Shape, folder: Path) -> None:
    """Load every tensor of `folder`/*.safetensors into `model`, as fp32.

    Raises `ModelError` naming the tensor when one is missing, unknown, stored twice or of another shape.
    """
    tensors = _read_tensors(folder)
    _check_coverage(tensors, shape, folder)
    state = {rule.mcore: rule.merge([tensors[name] for name in rule.hf]) for rule in rules(shape)}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters.pop(name).copy_(value)
    if parameters:
        raise ModelError(
            f"{folder}: no rule fills {sorted(parameters)} of the model; learner/convert/names.py needs one"
        )


def export_hf(model: GPTModel, shape: Qwen3Shape) -> dict[str, torch.Tensor]:
    """The weights under Hugging Face names: fp32 copies on the CPU, always in the same order."""
    parameters = dict(model.named_parameters())
    shapes = hf_shapes(shape)
    tensors = {}
    for rule in rules(shape):
        merged = parameters[rule.mcore].detach()
        parts = rule.split(merged, [shapes[name][0] for name in rule.hf])
        for name, part in zip(rule.hf, parts, strict=True):
            tensors[name] = torch.empty(shapes[name]).copy_(part)
    return tensors


def save_hf(tensors: dict[str, torch.Tensor], folder: Path, source: Path) -> None:
    """Write exported `tensors` to `folder` with config and tokenizer files copied from `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED_PATTERNS:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no *.safetensors file; give a Hugging Face checkpoint folder with weights"
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 (a handle, not a mapping)
                if name in tensors:
                    raise ModelError(f"{path}: tensor {name} is stored twice; keep one copy of the weights")
                tensors[name] = shard.get_tensor(name).float()
    return tensors


def _check_coverage(tensors: dict[str, torch.Tensor], shape: Qwen3Shape, folder: Path) -> None:
    expected = hf_shapes(shape)
    # Published tied checkpoints often store the shared matrix under both names.
    if shape.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
            raise ModelError(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight, yet config.json says "
                "tie_word_embeddings; set it to false or remove lm_head.weight"
            )
    for name, dims in expected.items():
        if name not in tensors:
            raise ModelError(f"{folder}: tensor {name} is missing, expected shape {dims}")
        if tuple(tensors[name].shape) != dims:
            got = tuple(tensors[name].shape)
            raise ModelError(f"{folder}: tensor {name}: got shape {got}, expected {dims} by config.json")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise ModelError(
            f"{folder}: unknown tensors {unknown}; expected exactly those of a dense Qwen3 model"
        )
