"""The layouts that are compared, and what each of them trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from learner.config import KlConfig, ObjectiveConfig, ParallelConfig
from tests.unit.learner.families import make_family

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 4}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "next": ("qwen3_next", {**GROUPED, "linear_num_key_heads": 4, "linear_num_value_heads": 8}),
    "tied": ("qwen3_next_mixed", {**GROUPED, "linear_num_key_heads": 4, "linear_num_value_heads": 8}),
    "dense": ("qwen3", GROUPED),
    "latent": ("deepseek_v3", {"first_k_dense_replace": 0}),
    "direct": ("moonlight", {}),
}
"""Family and the fields of config.json that let four ranks share it."""

EVERY_TERM = ObjectiveConfig(
    kl=KlConfig(coefficient=0.1, where="loss", estimator="k3"), entropy=0.05, correction="tis"
)
"""A loss of all its terms, each token by itself."""

BY_SAMPLE = ObjectiveConfig(
    kl=KlConfig(coefficient=0.1),
    correction="mis",
    mis_low=0.003,
    aggregation="sequence_mean",
    advantage="reinforce_pp",
    mini_batches=2,
)
"""Ratios, weights and means of whole samples, statistics of the whole batch, scores before the step."""

ROUTED = ObjectiveConfig(routing_replay=True)
"""Every token to experts that its record names, in what the backward pass computes again, too."""

OBJECTIVES = {"terms": EVERY_TERM, "samples": BY_SAMPLE, "routed": ROUTED, "bf16": EVERY_TERM}


def layout(**sizes: int) -> ParallelConfig:
    return ParallelConfig(**sizes)


PLANS: dict[int, dict[str, tuple[ParallelConfig, tuple[str, ...]]]] = {
    2: {
        "TP 2": (layout(tensor=2), ("next", "dense", "latent")),
        "TP 2 ETP 2": (layout(tensor=2, expert_tensor=2), ("next",)),
        "TP 2 EP 2": (layout(tensor=2, expert=2), ("next",)),
        "PP 2": (layout(pipeline=2), ("next", "tied", "dense", "latent")),
        "CP 2": (layout(context=2), ("next", "dense", "latent")),
        "DP 2": (layout(), ("next", "dense")),
        "DP 2 EP 2": (layout(expert=2), ("next", "direct")),
        "DP 2 ETP 2": (layout(expert_tensor=2), ("next",)),
    },
    4: {
        "TP 4": (layout(tensor=4), ("next",)),
        "TP 2 PP 2": (layout(tensor=2, pipeline=2), ("next", "tied")),
        "TP 2 DP 2 EP 2": (layout(tensor=2, expert=2), ("next", "latent")),
        "TP 2 DP 2 EP 2 ETP 2": (layout(tensor=2, expert=2, expert_tensor=2), ("next",)),
        "TP 2 CP 2": (layout(tensor=2, context=2), ("next", "latent")),
        "PP 2 DP 2 EP 2": (layout(pipeline=2, expert=2), ("next",)),
        "PP 2 CP 2": (layout(pipeline=2, context=2), ("next",)),
        "CP 2 DP 2 EP 2": (layout(context=2, expert=2), ("next",)),
        "DP 4 EP 2": (layout(expert=2), ("next",)),
    },
}
"""By world size: the layout, and the models that are trained in it."""


BY_SAMPLE_TOO = ("TP 2", "PP 2", "CP 2", "DP 2", "PP 2 CP 2", "PP 2 DP 2 EP 2")
"""Layouts in which `next` is also trained by the other objective."""

ROUTED_TOO = ("TP 2", "PP 2", "CP 2", "DP 2 EP 2", "TP 2 PP 2", "TP 2 CP 2", "PP 2 DP 2 EP 2")
"""Layouts in which `next` is also trained with routing replay."""

BF16_TOO = ("TP 2 EP 2", "PP 2")
"""Layouts in which `next` is also held in bf16, of which its weights are compared."""


class Trial(NamedTuple):
    """A model trained in a layout by an objective."""

    name: str
    parallel: ParallelConfig
    case: str
    kind: str

    @property
    def all_calls(self) -> bool:
        """Whether the trainer's other calls are compared, too, once a layout or so."""
        return self.kind == "samples"

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return "bfloat16" if self.kind == "bf16" else "float32"

    @property
    def id(self) -> str:
        return f"{self.name}-{self.case}-{self.kind}"


def trials(size: int) -> Iterator[Trial]:
    """What a world of `size` ranks trains, layout by layout."""
    for name, (parallel, cases) in PLANS[size].items():
        for case in cases:
            yield Trial(name, parallel, case, "terms")
        if name in BY_SAMPLE_TOO:
            yield Trial(name, parallel, "next", "samples")
        if name in ROUTED_TOO:
            yield Trial(name, parallel, "next", "routed")
        if name in BF16_TOO:
            yield Trial(name, parallel, "next", "bf16")


def make_checkpoints(folder: Path) -> None:
    """Write the model of each case to a folder of its name, and another, which is its reference model."""
    for case, (family, changes) in CASES.items():
        make_family(family, folder / case, **changes)
        make_family(family, reference_of(folder / case), std=0.08, **changes)


def reference_of(folder: Path) -> Path:
    """The reference model of the model in `folder`."""
    return folder.with_name(f"{folder.name}-reference")
