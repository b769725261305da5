"""What rank 0 announces, the other ranks do, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch.distributed as dist

from learner.config import ParallelConfig
from learner.model import world
from learner.model.world import join_world
from learner.ranks import (
    End,
    Export,
    Follower,
    Generate,
    GoBack,
    GoOn,
    Keep,
    Load,
    Order,
    Ranks,
    Score,
    Supervise,
    Train,
)


def followed(orders: list[Order], load: Any) -> dist.Store:
    """The store after a follower heard these and an `End`."""
    store = dist.HashStore()
    leader = Ranks(0, 2, store)
    for order in [*orders, End()]:
        leader.say(order)
    Follower(Ranks(1, 2, store), Mock(), load).follow()
    leader.dismiss()  # at once: it was heard
    return store


def test_every_order_is_a_call_of_the_trainer() -> None:
    join_world()
    trainer, load = Mock(), Mock()
    load.return_value = trainer
    trainer.snapshot.side_effect = ["first", "second"]
    samples = [([1, 2], [3]), ([4], [5])]
    followed(
        [
            Load("folder"),
            Keep(),
            Supervise(samples, 0.5),
            Keep(),
            GoBack(),
            Train(0),
            Export(),
            Score([[1, 2]], 0.7),
            Generate([[1]], 4, 0, 1.0, 9),
            GoOn("step-7"),
            Load("other"),
        ],
        load,
    )
    assert load.mock_calls[0] == call(Path("folder"))
    assert load.call_args_list[-1] == call(Path("other"))
    assert trainer.method_calls == [
        call.snapshot(),
        call.sft_step(samples, 0.5),
        call.snapshot(),
        call.restore("second"),
        call.train_step([], 0),
        call.export(),
        call.score([[1, 2]], 0.7),
        call.generate(prompts=[[1]], max_new_tokens=4, eos_id=0, temperature=1.0, seed=9),
        call.load_checkpoint(Path("step-7")),
    ]


def test_what_was_heard_is_forgotten() -> None:
    join_world()
    store = followed([Load("folder"), Export()], Mock())
    assert not store.check(["order/0"])
    assert not store.check(["order/1"])


def test_alone_nothing_is_announced() -> None:
    ranks = Ranks()
    ranks.say(Export())
    ranks.dismiss()


def test_without_variables_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.meet(ParallelConfig())
    assert (ranks.rank, ranks.size) == (0, 1)


def test_one_rank_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each collective costs a step of a small model a share of a millisecond, even of one rank."""
    join_world()
    monkeypatch.setattr(world, "dist", None)
    assert world.sum_over_ranks([1.5, 2.0]) == world.max_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    assert list(world.merge_over_ranks({"b": 2.0, "a": 1.0}).items()) == [("a", 1.0), ("b", 2.0)]
    assert world.union_over_ranks(["b", "a", "b"]) == ["a", "b"]
