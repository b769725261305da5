"""Which combinations of loss, mode and correction mean something, and which settings have no effect.

The table of `docs/objectives.md` is made of `LEGAL`; what is not in it is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from learner.config import ObjectiveConfig

CORRECTIONS = ("none", "tis", "icepop", "mis", "geo", "vtrace")
"""Every correction."""
MASKS = ("none", "icepop", "mis", "geo")
"""Those that can do with a mask alone, which is all that mode `bypass` takes of them."""
LOSSES = ("ppo_clip", "gspo", "cispo", "topr")
"""Every built-in loss; `module:function` names one of the user's own."""
ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp")
"""Every built-in advantage, likewise."""
CUSTOM = "module:function"
"""How the table calls a loss of the user's own."""


@dataclass(frozen=True)
class Legal:
    """Combinations that mean something."""

    loss: str
    """One of `LOSSES`, or `CUSTOM`."""
    mode: str
    """`decoupled` or `bypass`, see `ObjectiveConfig.mode`."""
    mini_batches: int
    """From so many mini-batches a batch on."""
    corrections: tuple[str, ...]
    """Those of `CORRECTIONS` that go with it."""


LEGAL = (
    Legal("ppo_clip", "decoupled", 1, CORRECTIONS),
    Legal("ppo_clip", "bypass", 1, MASKS),
    Legal("gspo", "bypass", 1, MASKS),
    Legal("gspo", "decoupled", 2, CORRECTIONS[:-1]),
    Legal("cispo", "bypass", 1, MASKS),
    Legal("cispo", "decoupled", 2, CORRECTIONS[:-1]),
    Legal("topr", "bypass", 1, MASKS),
    Legal(CUSTOM, "decoupled", 1, CORRECTIONS),
    Legal(CUSTOM, "bypass", 1, MASKS),
)


def refusal(loss: str, mode: str, correction: str, mini_batches: int) -> str | None:
    """Why a combination is refused, naming the field to change; None if it is legal."""
    kind = loss if loss in LOSSES else CUSTOM
    if any(
        (row.loss, row.mode) == (kind, mode)
        and row.mini_batches <= mini_batches
        and correction in row.corrections
        for row in LEGAL
    ):
        return None
    if mode == "bypass":
        return (
            f"objective.correction: got `{correction}` with mode `bypass`, whose ratio already is pi / mu, "
            "so the weight would count twice; use `none`, `icepop`, `mis` or `geo`, or mode `decoupled`"
        )
    if loss == "topr":
        return (
            "objective.mode: got `decoupled` with loss `topr`, whose ratio is that to the policy which wrote "
            "the samples, hence already the correction; use mode `bypass` and correction `none`"
        )
    if mini_batches == 1:
        return (
            f"objective.mode: got `decoupled` with loss `{loss}` and one mini-batch a batch, where its own "
            "ratio pi / pi_p is 1 and does nothing; use mode `bypass` and correction `none`, or "
            "mini_batches of 2 or more"
        )
    return (
        f"objective.correction: got `vtrace` with loss `{loss}`: V-trace is defined for the plain policy "
        "gradient, not for a loss with a ratio of its own; use loss `ppo_clip`, or another correction"
    )


def idle_settings(config: ObjectiveConfig) -> list[str]:
    """One sentence for each setting that was changed from its default and cannot act."""
    return [
        f"objective.{name} has no effect {why}"
        for name, why in _idle(config)
        if _value(config, name) != _value(type(config)(), name)
    ]


def _idle(config: ObjectiveConfig) -> Iterator[tuple[str, str]]:
    """(field, why) of all that the rest of the configuration leaves unused."""
    own = config.loss not in LOSSES
    if config.loss == "ppo_clip" and config.mode == "decoupled" and config.mini_batches == 1:
        why = (
            "in mode `decoupled` with one optimizer step a batch, where the ratio is 1; the correction "
            "bounds the step instead"
        )
        yield from ((name, why) for name in ("clip_low", "clip_high", "dual_clip"))
    elif config.loss != "ppo_clip" and not own:
        why = f"on loss `{config.loss}`, which has bounds of its own"
        yield from ((name, why) for name in ("clip_low", "clip_high", "dual_clip"))
    for loss, fields in {"gspo": ("gspo_low", "gspo_high"), "cispo": ("cispo_cap",)}.items():
        if config.loss != loss and not own:
            yield from ((name, f"on loss `{config.loss}`") for name in fields)
    for correction in ("icepop", "mis", "geo"):
        if config.correction != correction:
            why = f"with correction `{config.correction}`"
            yield from ((f"{correction}_{end}", why) for end in ("low", "high"))
    weighs_kl = config.kl.coefficient > 0 and config.kl.where == "loss"
    if config.mode == "bypass" and not weighs_kl:
        yield "cap", "in mode `bypass`, which takes only the masks of a correction"
    elif config.mode == "decoupled" and config.correction not in ("tis", "mis", "geo"):
        yield "cap", f"with correction `{config.correction}`"
    if config.aggregation != "sequence_sum":
        yield "sequence_constant", f"with aggregation `{config.aggregation}`"
    if config.overlong != "penalty":
        why = f"with overlong `{config.overlong}`"
        yield from ((name, why) for name in ("overlong_length", "overlong_ramp", "overlong_factor"))
    if config.kl.coefficient == 0:
        yield from ((f"kl.{name}", "while kl.coefficient is 0") for name in ("in", "estimator", "reference"))


def _value(config: ObjectiveConfig, path: str) -> object:
    """The setting under its name in a config file, `kl.in` included."""
    tree = msgspec.to_builtins(config)
    for name in path.split("."):
        tree = tree[name]
    return tree


def table() -> str:
    """`LEGAL` in Markdown."""
    rows = [
        f"| {row.loss} | {row.mode} | {row.mini_batches} or more | {', '.join(row.corrections)} |"
        for row in LEGAL
    ]
    head = ["| loss | mode | mini-batches a batch | corrections |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"
