"""What a Hugging Face config.json says of a model, read strictly.

A field that changes the mathematics and is not built here is refused by name, and so is one that
nobody knows: a model that trains on slightly different mathematics than the engine samples from
fails without a message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from learner.errors import ConfigError, ModelError
from learner.model.families import FAMILIES, Family
from learner.model.shape import Shape

IGNORED = frozenset(
    {
        "_name_or_path",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of every family that do not change the model's output."""


def read_shape(folder: Path) -> Shape:
    """Read `folder`/config.json. Raises `ModelError` naming the file and the field."""
    path = folder / "config.json"
    try:
        return shape_of(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; give a Hugging Face checkpoint folder") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error}); copy the checkpoint again") from error
    except (ConfigError, msgspec.ValidationError) as error:
        raise ModelError(f"{path}: {error}") from error


def shape_of(config: dict[str, Any]) -> Shape:
    """The architecture that the fields of a config.json describe.

    Raises `ConfigError` for a value or a field that is not built, and `msgspec.ValidationError` for a
    missing field or one of another type.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type: got {model_type!r}, expected one of {sorted(FAMILIES)}")
    architecture, family = FAMILIES[model_type]
    _expect("architectures", config.get("architectures") or [architecture], [architecture])
    fields = config | _rope(config, "yarn" in family.__struct_fields__)
    _refuse_others(fields, family)
    return msgspec.convert(fields, family).shape()


def _rope(config: dict[str, Any], stretched: bool) -> dict[str, Any]:
    """Rotary fields, from where transformers 5 writes them or from where older checkpoints do.

    `stretched`: whether the family is built with YaRN.
    """
    place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(place) or {}
    read = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    others = {name: rope[name] for name in rope.keys() - read.keys() - {"rope_type", "type"}}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "yarn" and stretched:
        return {**read, "yarn": others}
    _expect(f"{place}.rope_type", kind, "default")
    for name, value in sorted(others.items()):
        raise ConfigError(f"{place}.{name}: got {value!r}, expected no such field")
    return read


def _refuse_others(fields: dict[str, Any], family: type[Family]) -> None:
    known = {"rope_parameters", "rope_scaling", *family.__struct_fields__, *IGNORED, *family.ignored}
    for name, value in sorted(fields.items()):
        if name in family.fixed:
            _expect(name, value, family.fixed[name])
        elif name not in known:
            raise ConfigError(
                f"{name}: got {value!r}, expected no such field in a {fields['model_type']} model; remove it "
                "if it does not change the model's output"
            )


def _expect(name: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise ConfigError(f"{name}: got {got!r}, expected {wanted!r}; nothing else is built here")
