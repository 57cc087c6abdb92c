"""Checkpoints are complete or invisible; run folders are resumed or refused, never mixed up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdpg_fast import checkpoint
from fdpg_fast.checkpoint import Checkpoint, CheckpointError
from fdpg_fast.config import Config
from fdpg_fast.run_directory import RunDirectory, RunDirectoryError


def example(step: int) -> Checkpoint:
    tensors = {"policy": {"w": torch.arange(6.0).view(2, 3).t() + step}, "state": {}}
    return Checkpoint(step=step, tensors=tensors, facts={"seed": 3, "lr": [0.1, 1e-300]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, example(7), keep=1)
    loaded = checkpoint.load(path)
    assert loaded.step == 7
    assert loaded.facts == {"seed": 3, "lr": [0.1, 1e-300]}
    torch.testing.assert_close(
        loaded.tensors["policy"]["w"], example(7).tensors["policy"]["w"], rtol=0, atol=0
    )
    assert loaded.tensors["state"] == {}


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, example(1), keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 900, 1000):
        checkpoint.save(tmp_path, example(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000900", "step-001000"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-001000"


def test_old_ones_survive_a_save_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, example(1), keep=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(tmp_path, example(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.load(tmp_path / "step-000001").step == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("crash_at", ["fill", "fsync", "rename"])
def test_a_process_that_dies_while_saving_leaves_the_old_one(tmp_path: Path, crash_at: str) -> None:
    """The process really dies: nothing is cleaned up, as after kill -9."""
    checkpoint.save(tmp_path, example(1), keep=1)
    child = os.fork()
    if child == 0:  # pragma: no cover - the process that dies
        if crash_at == "fill":
            checkpoint.save_file = lambda *a: os._exit(9)
        elif crash_at == "fsync":
            os.fsync = lambda *a: os._exit(9)  # type: ignore[assignment]
        else:
            Path.rename = lambda *a: os._exit(9)  # type: ignore[assignment, method-assign]
        checkpoint.save(tmp_path, example(2), keep=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"
    checkpoint.save(tmp_path, example(2), keep=1)  # what the dead process left is no obstacle
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, example(1), keep=1)
    weights = path / "policy.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"policy.safetensors expected .* SHA-256 .* got"):
        checkpoint.load(path)
    weights.write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match="Way out: remove"):
        checkpoint.load(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(path)


def test_an_unfinished_one_is_invisible_and_named_when_asked_for(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, example(1), keep=1)
    (path / "manifest.json").unlink()
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="never finished"):
        checkpoint.load(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, example(1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="expected format 1, got 99"):
        checkpoint.load(path)


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def first(aside: Path) -> None:
        (aside / "old").write_text("1")

    def second(aside: Path) -> None:
        assert (target / "old").exists()
        (aside / "new").write_text("2")

    checkpoint.replace_directory(target, first)
    checkpoint.replace_directory(target, second)
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_files_are_for_whom_the_umask_says(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:
        path = checkpoint.save(
            tmp_path, Checkpoint(1, {"policy": {"x": torch.ones(2)}}, {}), keep=1
        )
    finally:
        os.umask(earlier)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


# ---- run folders ----------------------------------------------------------------------------


def test_a_new_run_writes_its_config(tmp_path: Path) -> None:
    config = Config().replace(steps=3)
    run = RunDirectory.create(tmp_path / "a" / "b", config)
    assert run.config() == config


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="holds files of something else"):
        RunDirectory.create(tmp_path, Config())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_a_run_in_it_asks_for_resume(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "r", Config())
    run.append("metrics.jsonl", [{"step": 1}])
    with pytest.raises(RunDirectoryError, match="--resume"):
        RunDirectory.create(tmp_path / "r", Config())


def test_a_run_that_never_began_is_written_over(tmp_path: Path) -> None:
    """But not a config.yaml that a person wrote, and then gave its folder as --out."""
    run = RunDirectory.create(tmp_path / "r", Config().replace(constrain=[{"contains": "dog"}]))
    run.write_json(run.facts, {"lambdas": {}})
    again = RunDirectory.create(tmp_path / "r", Config().replace(steps=3))
    assert again.config().run.steps == 3
    mine = tmp_path / "r" / "config.yaml"
    mine.write_text("# mine\n" + mine.read_text())
    with pytest.raises(RunDirectoryError, match="--resume"):
        RunDirectory.create(tmp_path / "r", Config())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="expected a folder, got a file"):
        RunDirectory.create(tmp_path / "file", Config())
    with pytest.raises(RunDirectoryError, match="cannot write in"):
        RunDirectory.create(tmp_path / "file" / "run", Config())
    with pytest.raises(RunDirectoryError, match="cannot write in"):
        RunDirectory.create("/proc/nowhere", Config())


def test_resume_wants_the_same_settings_but_for_the_part_run(tmp_path: Path) -> None:
    config = Config()
    RunDirectory.create(tmp_path / "r", config)
    run, newest = RunDirectory.resume(tmp_path / "r", config.replace(steps=99))
    assert newest is None
    assert run.config().run.steps == 99
    with pytest.raises(RunDirectoryError, match=r"another optimiser\.learning_rate, run\.seed"):
        RunDirectory.resume(tmp_path / "r", config.replace(learning_rate=1.0, seed=4))
    with pytest.raises(RunDirectoryError, match="no folder"):
        RunDirectory.resume(tmp_path / "missing", config)
    with pytest.raises(RunDirectoryError, match=r"found no config\.yaml"):
        RunDirectory.resume(tmp_path, config)


def test_logs_are_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "r", Config())
    run.append("metrics.jsonl", [{"step": s, "x": float(s)} for s in (1, 2, 3)])
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "x"')  # a crash while writing
    run.rewind(2)
    assert [r["step"] for r in run.read("metrics.jsonl")] == [1, 2]


def test_logs_hold_json_only(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "r", Config())
    run.append("metrics.jsonl", [{"step": 1, "a": float("nan"), "b": -float("inf"), "c": [0.5]}])
    text = (run.path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": "-inf",
        "c": [0.5],
    }


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    opens = (
        "import sys; from fdpg_fast.config import Config; from fdpg_fast.run_directory import "
        "RunDirectory; RunDirectory.create(sys.argv[1], Config())"
    )

    def elsewhere() -> str:
        words = [sys.executable, "-c", opens, str(path)]
        return subprocess.run(words, capture_output=True, text=True, check=False).stderr

    run = RunDirectory.create(path, Config())
    again, _ = RunDirectory.resume(path, None)  # this process may, as often as it likes
    assert f"another process is training in {path}" in elsewhere()
    run.release()
    assert "another process" in elsewhere()
    again.release()
    assert elsewhere() == ""


def test_a_process_that_is_forked_has_no_claim_and_keeps_none(tmp_path: Path) -> None:
    """As the workers of a scorer's pool."""
    code = """
import os, sys
from fdpg_fast.config import Config
from fdpg_fast.run_directory import RunDirectory, RunDirectoryError
run, (theirs, tell), (wait, go) = RunDirectory.create(sys.argv[1], Config()), os.pipe(), os.pipe()
if os.fork() == 0:
    try:
        RunDirectory.resume(sys.argv[1], None)
    except RunDirectoryError as error:
        os.write(tell, str(error).encode())
    os.read(wait, 1)
    os._exit(0)
said = os.read(theirs, 1000).decode()
run.release()
RunDirectory.resume(sys.argv[1], None)  # though the child lives
os.write(go, b".")
print(said)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "another process is training" in done.stdout, done.stderr
