"""The two clocks of an engine's use."""

from __future__ import annotations

from actors.utilisation import Utilisation


def test_only_time_with_a_lease_and_without_new_weights_counts() -> None:
    now = 0.0
    use = Utilisation(lambda: now)
    for at, leases, requests, updating in [
        (2.0, 1, 0, False),  # held
        (3.0, 1, 4, False),  # busy
        (6.0, 2, 4, True),  # new weights
        (7.0, 2, 4, False),  # busy
        (11.0, 1, 0, False),  # held: the reward
        (12.0, 0, 1, False),  # somebody scores, no lease
        (20.0, 0, 0, False),
    ]:
        now = at
        use.note(leases=leases, requests=requests, updating=updating)
    assert (use.held_s, use.busy_s) == (1 + 3 + 4 + 1, 3 + 4)
