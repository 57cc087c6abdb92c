"""Every recipe of the package runs: two steps each, with a tiny model in place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import write_tiny_model

from fdpg_fast import cli
from fdpg_fast.config import Config, describe, recipes
from fdpg_fast.run_directory import RunDirectory


@pytest.mark.parametrize("name", recipes())
def test_it_says_what_it_shows(name: str) -> None:
    assert len(describe(recipes()[name])) > 20
    assert Config.read(name).target.spec()


@pytest.mark.parametrize("name", recipes())
def test_it_runs_for_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdpg_fast.trainer.write_report", lambda runs, path: path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "run"
    words = [
        *("train", name, "--model.name", str(model), "--out", str(out)),
        *("--run.steps", "2", "--run.evaluation_samples", "16"),
        *("--sampling.max_new_tokens", "6", "--sampling.samples_per_prompt", "16"),
        *("--prompts.source", "once there", "--prompts.prompts_per_step", "1"),
        *("--target.fit_samples", "512"),
    ]
    assert cli.main(words) == 0
    torch.set_num_threads(threads)
    run = RunDirectory.open(out)
    assert [record["step"] for record in run.read("metrics.jsonl")] == [1, 2]
    run.require_model()
