"""What the configuration of the engine and of sampling allows, and the command line made of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from actors.config import EngineConfig, SamplingConfig
from actors.server import command, environment


@pytest.mark.parametrize(("field", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.1)])
def test_a_filter_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"{field}: got {value}"):
        msgspec.convert({field: value}, SamplingConfig)


@pytest.mark.parametrize("field", ["repetition_penalty", "logit_bias", "n"])
def test_an_unknown_field_is_refused_by_name(field: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"unknown field `{field}`"):
        msgspec.convert({field: 1}, SamplingConfig)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_the_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.temperature"):
        msgspec.convert({"temperature": temperature}, SamplingConfig)


def test_server_args_win_and_make_flags() -> None:
    config = EngineConfig(server_args={"sleep-on-idle": False, "tp-size": 2, "enable-metrics": True})
    line = command(Path("m"), config, port=1, seed=2, load_format="dummy")
    assert "--sleep-on-idle" not in line
    assert "--enable-metrics" in line
    assert line[line.index("--tp-size") + 1] == "2"


def test_only_a_cpu_engine_gets_our_platform() -> None:
    assert environment(EngineConfig())["SGLANG_PLATFORM"] == "slipstream_cpu"
    cuda = EngineConfig(device="cuda")
    assert "SGLANG_PLATFORM" not in environment(cuda)
    line = command(Path("m"), cuda, port=1, seed=2, load_format="auto")
    assert "sglang.launch_server" in line
    assert "torch_native" not in line


def test_ranks_of_a_cpu_engine_need_no_numa_node_each() -> None:
    pair = EngineConfig(server_args={"tp-size": 2, "pp-size": 2})
    assert environment(pair)["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
    assert environment(pair)["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment(EngineConfig())


def test_a_second_file_of_options_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"server_args: got 'config'.*one by one"):
        msgspec.convert({"server_args": {"config": "mine.yaml"}}, EngineConfig)


def test_a_pause_that_would_falsify_records_is_refused_with_the_reason() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"caches of the old weights.*set abort, finish or"):
        msgspec.convert({"pause": "in_place"}, EngineConfig)
