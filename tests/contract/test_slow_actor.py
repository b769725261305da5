"""An actor ten times slower than the others is left out, soon, and an equal one never is."""

from __future__ import annotations

from benchmarks.rules import Ours
from benchmarks.simulation import Figures, Fleet, Simulation
from buffer.client import Stream

STEP_MS = 7_700
"""Half of the mean time of a group."""


def simulate(stream: Stream, name: str, eta: int, actors: int, slowness: float = 1.0) -> Figures:
    """16 steps of 16 groups with so many actors, one of them slower, each with four groups under way."""
    names = [f"actor-{number}" for number in range(actors)]
    rule = Ours(Stream(stream.redis, f"{stream.run}-{name}"), names, batch=16, eta=eta, cap=16)
    fleet = Fleet(4, {**dict.fromkeys(names, 1.0), names[0]: slowness})
    return Simulation(rule, fleet, eta=eta, steps=16, step_ms=STEP_MS).run()


def test_a_slow_actor_costs_the_others_less_than_a_twentieth(stream: Stream) -> None:
    for eta in (0, 2):
        without = simulate(stream, f"{eta}-without", eta, 7)
        slow = simulate(stream, f"{eta}-slow", eta, 8, 10.0)
        assert slow.slow_actors == ["actor-0"]
        assert slow.first_slow_step <= 3
        assert slow.step_ms < 1.05 * without.step_ms
        assert slow.violations == 0
        assert without.slow_actors == []


def test_equal_actors_are_never_slow(stream: Stream) -> None:
    figures = simulate(stream, "equal", 1, 8)
    assert (figures.slow_actors, figures.wasted, figures.violations) == ([], 0.0, 0)
    assert figures.bias == 1.0
