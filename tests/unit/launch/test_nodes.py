"""The processes of a learner on several nodes."""

from __future__ import annotations

import pytest

from launch.cli import _parse, build_parser
from launch.nodes import Nodes


def test_one_process_needs_no_variables() -> None:
    assert Nodes().ranks() == [{}]


def test_all_nodes_on_this_machine_meet_on_loopback() -> None:
    ranks = Nodes(2, 2).ranks()
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"4"}


def test_a_node_starts_its_own_ranks() -> None:
    nodes = Nodes(3, 2, 1, "[fd00::7]:29500")
    nodes.check()
    assert not nodes.leads
    assert [rank["RANK"] for rank in nodes.ranks()] == ["2", "3"]
    assert {(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in nodes.ranks()} == {("fd00::7", "29500")}
    assert "GLOO_SOCKET_IFNAME" not in nodes.ranks()[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["learner", "name=a", "--nodes", "2", "seed=1", "--redis", "redis://h", "data.path=d"],
        ["learner", "--nodes", "2", "--redis", "redis://h", "name=a", "seed=1", "data.path=d"],
    ],
)
def test_overrides_stand_anywhere(argv: list[str]) -> None:
    args = _parse(build_parser(), argv)
    assert args.overrides == ["name=a", "seed=1", "data.path=d"]
    assert args.nodes == 2


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(build_parser(), ["learner", "--node-count"])
    assert "unrecognized arguments: --node-count" in capsys.readouterr().err
