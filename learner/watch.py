"""Warnings and the end of a run whose corrections throw its samples away.

A condition is logged when it begins and not again until it has ended. What ends a run is counted over
steps in a row and raised before the next step trains, so that no trained step is left uncommitted.
"""

from __future__ import annotations

import logging

from learner.config import ObjectiveConfig
from learner.errors import Aborted
from learner.metrics import Metrics

log = logging.getLogger("learner.watch")

MASKED_SHARE = 0.2
"""More masked tokens than this are worth a warning."""
FIRST_WEIGHT = 0.1
"""A mean first-token weight of `vtrace` below this is worth a warning."""


class Watch:
    """Looks at the metrics of every step.

    watch.check()        # before a step; raises `Aborted`
    watch.see(metrics)   # after it
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self._config = config
        self._standing: set[str] = set()
        self._beyond = {"masked": 0, "staleness": 0}

    def see(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of step `step`; logs what has begun."""
        correction = self._config.correction
        masked, first = metrics["masked"] or 0.0, metrics["first_weight"]
        self._tell(
            "masked",
            masked > MASKED_SHARE,
            f"step {step}: {correction} masks {masked:.0%} of the tokens, more than {MASKED_SHARE:.0%}; "
            + _wider(self._config),
        )
        self._tell(
            "first",
            first is not None and first < FIRST_WEIGHT,
            f"step {step}: vtrace leaves an answer's first token a mean weight of {first or 0.0:.3f}, below "
            f"{FIRST_WEIGHT}: early tokens are hardly trained; it suits short answers only, use tis",
        )
        self._count("masked", masked > self._config.abort.masked)
        limit, staleness = self._config.abort.staleness, metrics["token_staleness_mean"] or 0.0
        self._count("staleness", 0 < limit < staleness)

    def check(self) -> None:
        """Raises `Aborted`, with the remedy, once a threshold was passed for `abort.steps` steps in a row."""
        limits = self._config.abort
        if self._beyond["masked"] >= limits.steps:
            raise Aborted(
                f"{self._config.correction} masked more than {limits.masked:.0%} of the tokens for "
                f"{limits.steps} steps in a row (objective.abort.masked); {_wider(self._config)}"
            )
        if self._beyond["staleness"] >= limits.steps:
            raise Aborted(
                f"trained tokens were more than {limits.staleness:g} steps old on average for "
                f"{limits.steps} steps in a row (objective.abort.staleness); lower "
                "stream.max_staleness or rollout.concurrency, or shorten answers"
            )

    def _tell(self, name: str, stands: bool, text: str) -> None:
        if stands and name not in self._standing:
            log.warning("%s", text)
        (self._standing.add if stands else self._standing.discard)(name)

    def _count(self, name: str, beyond: bool) -> None:
        self._beyond[name] = self._beyond[name] + 1 if beyond else 0


def _wider(config: ObjectiveConfig) -> str:
    """What to do about a mask that drops too much."""
    limits = f"widen objective.{config.correction}_low / {config.correction}_high, "
    return (limits if config.correction != "none" else "") + (
        "lower stream.max_staleness, or use correction "
        + ("`tis`, which masks nothing" if config.mode == "decoupled" else "`none`")
    )
