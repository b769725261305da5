"""A reward of your own: the share of the equations in an answer that hold, next to GSM8K's.

In a run's TOML file, with this repository on the actors' PYTHONPATH:

    [rollout.reward.correct]
    function = "actors.rewards:gsm8k"
    [rollout.reward.sound]
    function = "examples.custom_reward:equations_hold"
    weight = 0.2
    arguments = { least = 1 }

`python -m examples.custom_reward` scores three answers with that, in worker processes as actors do.
"""

import asyncio
import re

from actors.config import LimitsConfig, RewardPart
from actors.errors import SampleError
from actors.rewards.pool import RewardPool

EQUATION = re.compile(r"(\d+)\s*([-+*])\s*(\d+)\s*=\s*(-?\d+)")


def equations_hold(text: str, answer: str, *, least: int) -> tuple[float, dict[str, float]]:
    """The share of equations such as `3*4=12` that are true; 0.0 with fewer than `least` of them.

    The second value holds named parts, for the record; returning the number alone is fine. A function
    may be `async`, and may have a parameter `tokens`, the length of the answer.
    """
    found = [(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(text)]
    true = sum({"+": a + b, "-": a - b, "*": a * b}[sign] == c for a, sign, b, c in found)
    return (true / len(found) if found and len(found) >= least else 0.0), {"equations": float(len(found))}


async def main() -> None:
    """Three answers to `3 boxes of 4 and 5 more`."""
    reward = {
        "correct": RewardPart(function="actors.rewards:gsm8k"),
        "sound": RewardPart(function=f"{__spec__.name}:equations_hold", weight=0.2, arguments={"least": 1}),
    }
    pool = RewardPool(reward, LimitsConfig(workers=2, deadline_s=5.0))
    for text in ("3*4=12, 12+5=17\n#### 17", "3*4=13, 12+5=17\n#### 17", "I guess #### 9"):
        try:
            verdict = await pool.score(text, "#### 17", tokens=len(text))
        except SampleError as error:  # hung, crashed, raised: no verdict, and the sample is left out
            print(f"invalid: {error}")
        else:
            print(f"{verdict.value:.2f} {verdict.parts}")
    await pool.close()


if __name__ == "__main__":
    asyncio.run(main())
