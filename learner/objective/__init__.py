"""The policy-gradient objective: pure functions over the N trained tokens of S samples.

mu wrote the tokens, pi_p is the policy at the start of the step, pi is the one differentiated. With
one optimizer step a batch pi_p = stopgrad(pi): the ratio pi / pi_p is 1 in value and carries the
gradient of log pi, so in mode `decoupled` clipping cannot act and the correction does all the work.
Log-ratios are clamped to +-10 before they are exponentiated. Definitions: `docs/objectives.md`.
"""

from learner.objective.tokens import LOG_RATIO_LIMIT, Tokens, Totals
from learner.objective.total import Objective, objective

__all__ = ["LOG_RATIO_LIMIT", "Objective", "Tokens", "Totals", "objective"]
