"""A tool of your own: unit conversion, for the environment that lets the policy call tools.

In a run's TOML file, with this repository on the actors' PYTHONPATH:

    [rollout.environment]
    path = "actors.environments:ToolUse"
    [rollout.environment.arguments]
    tools = { convert = "examples.custom_tool:convert", python = "actors.limited.tools:python" }
    limits = { workers = 2, deadline_s = 5.0, memory_mb = 512 }

`python -m examples.custom_tool` calls it as an actor does: in a process of its own, by name.
"""

import asyncio

from actors.config import LimitsConfig
from actors.errors import SampleError
from actors.limited.workers import Workers

METRES = {"m": 1.0, "km": 1000.0, "mile": 1609.344, "ft": 0.3048}


def convert(value: float, unit: str, to: str) -> str:
    """A length in another unit, to four digits. What it returns, or raises, the policy is told."""
    return f"{value * METRES[unit] / METRES[to]:.4g} {to}"


async def main() -> None:
    """One good call and one bad one."""
    tools = {"convert": f"{__spec__.name}:convert"}
    async with Workers("actors.limited.tools:toolbox", [tools], LimitsConfig(workers=1)) as workers:
        for arguments in (
            {"value": 26.2, "unit": "mile", "to": "km"},
            {"value": 1, "unit": "yard", "to": "m"},
        ):
            try:
                print(await workers.call("convert", arguments))
            except SampleError as error:
                print(f"error: {error}")


if __name__ == "__main__":
    asyncio.run(main())
