"""What the bound costs: our policies for late groups, and the rule of others, in virtual time.

    python -m benchmarks.late_policies [--steps 40] [--plot docs/late_policies.png] [--json] [--quick]

A discrete-event simulation (`benchmarks.simulation`) drives the real functions of the replay stream on a
real server.
Eight actors keep 2 B groups under way together and generate as fast as the learner trains: a step takes it
half of the mean time of a group. `others` admits while accepted + running < (eta + version + 1) B and
trains the first B that are ready. The fleet of seven is what the fleet with a slow actor is held against.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.harness import parser, progress, report, server, table
from benchmarks.rules import Others, Ours, Rule
from benchmarks.simulation import TOKEN_MS, Figures, Fleet, Simulation, length
from buffer.client import Stream

ACTORS, SLOWNESS = 8, 10.0
POLICIES: dict[str, tuple[str, float]] = {
    "wait": ("wait", 1.0),
    "drop": ("drop", 1.0),
    "drop 1.25": ("drop", 1.25),
}
"""Name -> policy and over-sampling; `others` is beside them."""
EQUAL, SLOW, WITHOUT = "8 equal", "7 + one slow", "7 equal"


class Scenario(msgspec.Struct, frozen=True):
    """One run: B, eta, the fleet, the policy."""

    batch: int
    """B, groups a step."""
    eta: int
    """The staleness bound in steps."""
    fleet: str
    """`EQUAL`, `SLOW` or `WITHOUT`."""
    policy: str
    """Key of `POLICIES`, or `others`."""


def scenarios(batches: list[int], etas: list[int]) -> Iterator[Scenario]:
    """All of them; of the fleet of seven only what the slow actor is held against."""
    for batch in batches:
        for eta in etas:
            for fleet in (EQUAL, SLOW):
                for policy in (*POLICIES, "others"):
                    yield Scenario(batch, eta, fleet, policy)
            yield Scenario(batch, eta, WITHOUT, "wait")


def fleet_of(scenario: Scenario) -> Fleet:
    """The actors of a scenario, each with B / 4 groups under way."""
    names = [f"actor-{number}" for number in range(7 if scenario.fleet == WITHOUT else ACTORS)]
    slowness = dict.fromkeys(names, 1.0)
    if scenario.fleet == SLOW:
        slowness[names[0]] = SLOWNESS
    return Fleet(scenario.batch // 4, slowness)


def play(scenario: Scenario, url: str, *, steps: int, step_ms: int) -> Figures:
    """Simulates one scenario."""
    fleet = fleet_of(scenario)
    if scenario.policy == "others":
        rule: Rule = Others(scenario.batch, scenario.eta)
        return Simulation(rule, fleet, eta=scenario.eta, steps=steps, step_ms=step_ms).run()
    policy, factor = POLICIES[scenario.policy]
    stream = Stream.connect(url, f"sim-{secrets.token_hex(4)}")
    stream.load_library()
    cap = ceil(factor * scenario.batch)
    rule = Ours(stream, [*fleet.slowness], batch=scenario.batch, eta=scenario.eta, policy=policy, cap=cap)
    figures = Simulation(rule, fleet, eta=scenario.eta, steps=steps, step_ms=step_ms).run()
    stream.redis.delete(*stream.redis.keys(f"{{{stream.run}}}:*"))
    stream.close()
    return figures


def line(scenario: Scenario, figures: Figures, others: Figures, steps: int) -> dict[str, Any]:
    """The figures of a scenario as they are printed."""
    return {
        **msgspec.structs.asdict(scenario),
        "step_s": figures.step_ms / 1000,
        "time_to_others": figures.step_ms / others.step_ms,
        "wasted": figures.wasted,
        "bias": figures.bias,
        "staleness": figures.staleness,
        "violations": figures.violations / (steps * scenario.batch),
        "slow_actors": figures.slow_actors,
        "first_slow_step": figures.first_slow_step,
    }


def plot(lines: list[dict[str, Any]], learner_s: float, path: Path) -> None:
    """Step time, waste and violations by eta, for both fleets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True, sharey="row")
    rows = {
        "step_s": "step time, s",
        "wasted": "wasted tokens, %",
        "violations": "groups beyond the bound, %",
    }
    for (key, name), pair in zip(rows.items(), axes, strict=True):
        for fleet, panel in zip((EQUAL, SLOW), pair, strict=True):
            for color, policy in enumerate((*POLICIES, "others")):
                for batch, style in zip(sorted({one["batch"] for one in lines}), ("-", "--"), strict=False):
                    own = [
                        one
                        for one in lines
                        if (one["fleet"], one["policy"], one["batch"]) == (fleet, policy, batch)
                    ]
                    scale = 1 if key == "step_s" else 100
                    values = [scale * one[key] for one in own]
                    label = f"{policy}, B = {batch}"
                    panel.plot(
                        [one["eta"] for one in own], values, f"{style}o", color=f"C{color}", label=label, ms=4
                    )
            panel.grid(alpha=0.3)
            panel.set_xticks(sorted({one["eta"] for one in lines}))
            if key == "step_s":
                panel.set_title(f"{fleet} actors" if fleet == EQUAL else "7 actors and one 10 x slower")
                panel.axhline(learner_s, color="gray", lw=1, ls=":", label="the learner alone")
                panel.set_yscale("log", base=2)
                panel.yaxis.set_major_formatter("{x:.0f}")
            if key == "violations":
                panel.set_xlabel("eta, steps")
        pair[0].set_ylabel(name)
    axes[0][1].legend(fontsize=7, ncols=2, handlelength=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    """Simulates and prints."""
    options = parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=40, help="steps of each run")
    options.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    options.add_argument("--etas", type=int, nargs="+", default=[0, 1, 2, 4])
    options.add_argument("--plot", type=Path, help="write the picture there")
    chosen = options.parse_args(arguments)
    if chosen.quick:
        chosen.steps, chosen.batches, chosen.etas = 8, [8], [1]
    mean_ms = sum(length(position, 0) for position in range(4000)) * TOKEN_MS // 4000
    played: dict[Scenario, Figures] = {}
    with server("everysec") as local:
        for scenario in scenarios(chosen.batches, chosen.etas):
            progress(f"{scenario}")
            played[scenario] = play(scenario, local.socket_url, steps=chosen.steps, step_ms=mean_ms // 2)
    lines = []
    for scenario, figures in played.items():
        fleet = SLOW if scenario.fleet == WITHOUT else scenario.fleet
        others = played[Scenario(scenario.batch, scenario.eta, fleet, "others")]
        lines.append(line(scenario, figures, others, chosen.steps))
    ours = [figures for scenario, figures in played.items() if scenario.policy != "others"]
    result = {
        "steps": chosen.steps,
        "mean_group_s": mean_ms / 1000,
        "learner_step_s": mean_ms / 2000,
        "violations": sum(figures.violations for figures in ours),
        "false_slow": sum(
            len(figures.slow_actors) for scenario, figures in played.items() if scenario.fleet != SLOW
        ),
        "runs": lines,
    }
    if chosen.plot:
        plot(lines, mean_ms / 2000, chosen.plot)
    headings = ["B", "eta", "actors", "policy", "step, s", "/ others", "wasted", "bias", "staleness", "over"]
    keys = ("batch", "eta", "fleet", "policy", "step_s", "time_to_others", "wasted", "bias", "staleness")
    cells = [[*(one[key] for key in keys), one["violations"], ", ".join(one["slow_actors"])] for one in lines]
    report(result, table([*headings, "answered slow"], cells), chosen)


if __name__ == "__main__":
    main(sys.argv[1:])
