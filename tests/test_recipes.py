"""Every recipe of the package runs: two steps each, with a tiny model in place of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny_model, write_tiny_t5

from fdpg_fast import cli, scorers
from fdpg_fast.building import model_of, prompts_of
from fdpg_fast.config import Config, describe, recipes
from fdpg_fast.run_directory import RunDirectory

SOURCES = {name: Config.read(name).prompts.source for name in recipes()}
WITH_PROMPTS = [name for name, at in SOURCES.items() if isinstance(at, str) and Path(at).is_file()]

# In place of prompts with names that are no words of the tiny model.
NAMES = {
    "character": '["there was named dog", "once named cat"]',
    "summary": '["summarize: dog ran", "summarize: cat sat"]',
}


@pytest.mark.parametrize("name", recipes())
def test_it_says_what_it_shows(name: str) -> None:
    assert len(describe(recipes()[name])) > 20
    assert Config.read(name).target.spec()


@pytest.mark.parametrize("name", recipes())
def test_it_runs_for_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdpg_fast.trainer.write_report", lambda runs, path: path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path / "run"
    words = [
        *("train", name, "--out", str(out)),
        *("--run.steps", "2", "--run.evaluation_samples", "16"),
        *("--sampling.max_new_tokens", "6", "--sampling.samples_per_prompt", "16"),
        *("--target.fit_samples", "512"),
    ]
    if name != "arithmetic":  # whose own model is as tiny
        write = write_tiny_t5 if name == "summary" else write_tiny_model
        words += ["--model.name", str(write(tmp_path / "model"))]
    if name in NAMES:
        words += ["--prompts.source", NAMES[name], "--prompts.prompts_per_step", "2"]
    elif isinstance(SOURCES[name], str) and name not in WITH_PROMPTS:
        words += ["--prompts.source", "once there"]
    assert cli.main(words) == 0
    torch.set_num_threads(threads)
    run = RunDirectory.open(out)
    assert [record["step"] for record in run.read("metrics.jsonl")] == [1, 2]
    run.require_model()


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_every_prompt_of_its_file_suits_its_target(name: str) -> None:
    config = Config.read(name)
    texts = prompts_of(config, model_of(config, "")).texts
    assert len(set(texts)) == len(texts) >= 2 * config.prompts.prompts_per_step
    for spec in config.target.constrain:
        assert scorers.from_spec(spec)([""] * len(texts), texts).sum() == 0


def test_a_classifier_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the comment, in place of the lexicon."""

    def load(name: str, label: str, log: bool, *_: Any) -> Any:
        assert (label, log) == ("POSITIVE", True)
        return lambda texts: [-0.5] * len(texts), label, False

    line = re.search(r"^#   (--target.reward .*)$", recipes()["sentiment"].read_text(), re.M)
    assert line is not None
    reward = Config.read("sentiment", shlex.split(line[1])).target.reward
    assert isinstance(reward, dict)
    assert reward.pop("beta") == 0.1
    monkeypatch.setattr(scorers, "_load_classifier", load)
    scorer = scorers.from_spec(reward)
    assert (scorer.name, scorer.kind) == ("log P(POSITIVE)", "real")
