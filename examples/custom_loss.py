"""A loss of your own: wrong answers push half as hard as right ones pull, and no ratio is clipped.

In a run's TOML file, with this repository on the learner's PYTHONPATH:

    [objective]
    loss = "examples.custom_loss:lenient"
    correction = "tis"

`python -m examples.custom_loss` computes loss and gradient of three tokens, with that correction.
"""

import torch

from learner.config import ObjectiveConfig
from learner.objective import Tokens, Totals, objective
from learner.objective.losses import FREE, Surrogate


def lenient(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """One loss a token, [N]. The correction, the KL, the entropy bonus and the mean are applied to it.

    `anchor` is the log-probability of each token [N] that the ratio is to: pi_p, or mu in mode `bypass`.
    What a bound of yours reached would be marked `LOW`, `HIGH` or `DUAL`, for the figures of a step.
    """
    ratio = (tokens.logprobs - anchor).exp()
    pull = torch.where(tokens.advantages < 0, 0.5 * tokens.advantages, tokens.advantages)
    return Surrogate(-pull * ratio, torch.full_like(tokens.sample, FREE))


def main() -> None:
    """Two tokens of a right answer, one of a wrong one; the second is much likelier now than when drawn."""
    logprobs = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    tokens = Tokens(
        logprobs=logprobs,
        proximal=logprobs.detach(),
        behaviour=torch.tensor([-1.0, -2.0, -2.0]),
        advantages=torch.tensor([1.0, 1.0, -1.0]),
        sample=torch.tensor([0, 0, 1]),
    )
    config = ObjectiveConfig(loss=f"{__spec__.name}:lenient", correction="tis")
    result = objective(tokens, Totals(tokens=3, samples=2), config)
    result.loss.backward()
    print(f"weights {result.weights.tolist()}")
    print(f"loss {result.loss.item():.3f}, gradient {[round(g, 3) for g in logprobs.grad.tolist()]}")


if __name__ == "__main__":
    main()
