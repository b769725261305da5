"""A stand-in for torchvision, which SGLang and transformers import for images that we never send.

torchvision's wheels for CUDA do not load beside a CPU torch, so a CPU set-up leaves the package out;
SGLang then fails at its imports, long before it would need anything of it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

MODULES = (
    "torchvision",
    "torchvision.io",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)
"""What is imported by name; parents first."""


class _Name(type):
    """A class whose attributes, such as members of an enumeration, are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Absent(ModuleType):
    """A module that has every name, and nothing behind it: instances of its classes do nothing."""

    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


def stand_in_for_torchvision() -> None:
    """Make ``import torchvision`` succeed in this process and its forks, unless the real one is there."""
    if find_spec("torchvision") is not None:
        return
    for name in MODULES:
        module = _Absent(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
