"""What can be evaluated: which weights a folder holds, and of which run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from launch.errors import LaunchError
from launch.subject import Subject, run_config_of, subject
from launch.tiny_model import make_tiny
from learner.checkpoint.folder import State, digest_of
from learner.convert.folders import hf_to_mcore
from learner.errors import CheckpointError
from learner.kept import Kept


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("subject") / "model", seed=0)


@pytest.fixture
def checkpoint(tmp_path: Path, model: Path) -> Path:
    """Megatron-Core's form of the model, as a learner saves it: with digests and `state.json`."""
    folder = tmp_path / "step-00000007-1"
    hf_to_mcore(model, folder, lambda done, total: None)
    for path in folder.glob("*.distcp"):
        path.with_suffix(".xxh3").write_text(digest_of(path))
    state = State(7, "committed", "weights", epoch=1, lineage=2, memory=msgspec.Raw(b"null"))
    (folder / "state.json").write_bytes(msgspec.json.encode(state))
    return folder


def test_a_kept_version_says_which_it_is_and_another_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with subject(tmp_path, like="", show=print) as found:
        assert found == Subject(tmp_path, None, "", None)
    (tmp_path / "version.json").write_bytes(msgspec.json.encode(Kept(3, "d", 1)))
    with subject(tmp_path, like="", show=print) as found:
        assert found == Subject(tmp_path, 3, "d", 1)


def test_a_checkpoint_is_a_model_for_the_time_of_the_block(checkpoint: Path, model: Path) -> None:
    shown: list[str] = []
    with subject(checkpoint, like=str(model), show=shown.append) as found:
        assert (found.version, found.digest, found.lineage) == (7, "weights", 2)
        read = {name: t for path in found.model.glob("*.safetensors") for name, t in load_file(path).items()}
        assert (found.model / "tokenizer.json").exists()
    assert not found.model.exists()
    written = load_file(model / "model.safetensors")
    assert read.keys() == written.keys()
    assert all(np.array_equal(read[name], written[name]) for name in written)
    assert shown[-1] == f"converting {checkpoint}: 3/3 files"


def test_somebody_elses_checkpoint_needs_its_model_named(checkpoint: Path, model: Path) -> None:
    (checkpoint / "state.json").unlink()
    with subject(checkpoint, like=str(model), show=print) as found:
        assert (found.version, found.digest, found.lineage) == (None, "", None)
    with (
        pytest.raises(LaunchError, match=r"is a checkpoint: say of which model by model\.path=FOLDER"),
        subject(checkpoint, like="", show=print),
    ):
        pass


def test_a_damaged_checkpoint_is_not_evaluated(checkpoint: Path, model: Path) -> None:
    path = next(checkpoint.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with (
        pytest.raises(CheckpointError, match=r"got digest \w+, it was written with"),
        subject(checkpoint, like=str(model), show=print),
    ):
        pass


def test_the_runs_configuration_is_found_from_every_folder_of_it(tmp_path: Path) -> None:
    run = {"name": "r", "rollout": {}, "stream": {}, "data": {"path": "questions"}}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(run))
    for folder in ("export", "export/inner", "weights/20", "checkpoints/step-00000020-1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text('{"model_type": "qwen3"}')
        assert run_config_of(tmp_path / folder) == run
    assert run_config_of(tmp_path)["data"] == {"path": ""}
