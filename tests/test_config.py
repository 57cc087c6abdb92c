"""Config: what a run can be told, and what it answers to what it cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fdpg_fast.config import Config, ConfigError, RunConfig, argument_parser, describe_keys


def test_defaults_are_those_of_the_dog_example() -> None:
    config = Config()
    assert config.objective.divergence == "js"
    assert config.optimiser.learning_rate == 3e-5
    assert config.samples_per_step == 256
    assert config.sampling.max_new_tokens == 40


def test_dump_round_trips(tmp_path: Path) -> None:
    config = Config.read(
        {"target": {"constrain": [{"contains": "dög"}]}, "prompts": {"source": ["a: b", "#c"]}},
        [
            "--optimiser.betas",
            "[0.9, 0.95]",
            "--objective.ratio_clip",
            "2",
            "--run.max_gap",
            "1e-2",
        ],
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    assert Config.read(path) == config


def test_dump_keeps_every_text_a_text(tmp_path: Path) -> None:
    """For this reader of YAML, which knows more numbers than others do, and for theirs."""
    texts = ["1e-1", "1E5", "-2.e+3", "1.5", "1_0", "0x1", "0o7", "1:30", ".inf", "2024-01-01"]
    texts += ["yes", "~", "null", "", " ", "a\nb", "a\n", "\n a", "\t", "\r\n", "\x85 a", "\u2028"]
    texts += ["\ufeffa", "\x00", "é", "😀", "a: b", "- a", "# a", "a #b", "'", '"', "%", "!a", "*a"]
    config = Config().replace(source=texts, constrain=[{"contains": text} for text in texts])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    assert Config.read(path) == config
    assert Config.read(yaml.safe_load(config.dump())) == config


def test_dump_writes_every_key() -> None:
    text = Config().dump()
    for part in dataclasses.fields(Config):
        for key in dataclasses.fields(getattr(Config(), part.name)):
            assert f"  {key.name}:" in text


def test_key_names_are_unique_over_all_parts() -> None:
    """Trainer(..., learning_rate=...) names a key without its part."""
    keys = [key for _, key, _ in Config()._items()]
    assert len(keys) == len(set(keys))


def test_every_key_is_explained_in_the_help() -> None:
    text = argument_parser().format_help()
    for part, key, _ in Config()._items():
        assert f"--{part}.{key}" in text
        assert f"{key}:" in str(type(getattr(Config(), part)).__doc__)
    assert "--optimiser.betas [[0.9, 0.999]]\n" in describe_keys()


def test_yaml_reads_scientific_numbers_anywhere(tmp_path: Path) -> None:
    """PyYAML alone reads 1e-4 as text."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "optimiser: {learning_rate: 1e-4}\ntarget:\n  reward: {length: words, beta: 1e-1}\n"
    )
    config = Config.read(path)
    assert config.optimiser.learning_rate == 1e-4
    assert config.target.reward == {"length": "words", "beta": 0.1}


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run: {steps: 7, seed: 3}\n")
    config = Config.read(path, ["--run.steps", "9"])
    assert (config.run.steps, config.run.seed) == (9, 3)


def test_texts_of_scorers_stay_texts(tmp_path: Path) -> None:
    """However much they look like YAML, and however deep they are."""
    texts = ["a: b", "1", "yes", "null", "[a-z]", "{x}", "# no"]
    specs: list[dict[str, Any]] = [{"contains": text, "case": True} for text in texts]
    specs += [{"words": [*texts, 1, None]}, {"all": [{"not": {"contains": "1"}}], "n": 2, "x": 0.5}]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"target": {"constrain": specs}}))
    line = ["--target.constrain", json.dumps(specs)]
    for config in (Config.read(path), Config.read({}, line), Config.read(path).replace(steps=3)):
        assert config.target.constrain == specs
        assert Config.read(yaml.safe_load(config.dump())) == config


def test_prompts_are_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    beside = folder / "prompts.txt"
    beside.write_text("a dog\n")
    long = "There was a dog. " * 100

    def source(text: str, *overrides: str) -> str | list[str]:
        (folder / "c.yaml").write_text(f"prompts: {{source: {text!r}}}\n")
        return Config.read("mine/c.yaml", overrides).prompts.source

    assert source("prompts.txt") == str(beside)
    assert source(str(beside)) == str(beside)
    assert source("mine/prompts.txt") == "mine/prompts.txt"  # as seen from the working folder
    assert source("x", "--prompts.source", "prompts.txt") == "prompts.txt"
    assert source("mine") == "mine"
    assert source(long) == long


def test_what_is_here_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is the same setting as before, seen from the same folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "default").mkdir()
    (tmp_path / "prompts.txt").write_text("a dog\n")
    monkeypatch.chdir(tmp_path)
    config = Config().replace(name="model", source="prompts.txt", constrain=[{"contains": "dog"}])
    located = config.located()
    assert located.model.name == str(tmp_path / "model")
    assert located.prompts.source == str(tmp_path / "prompts.txt")
    assert located.target.folder == str(tmp_path)
    assert located.located() == located
    assert config.difference(located) == located.difference(config) == []
    monkeypatch.chdir("/")
    assert located.located() == located
    assert config.difference(located) == ["model.name"]
    monkeypatch.chdir(tmp_path)
    for name in ("", "default", "embedded:arithmetic", "gpt2", "someone/model", "./nowhere"):
        for source in ("", "a dog", "nowhere.txt", ["prompts.txt"], "a dog. " * 1000):
            other = Config().replace(name=name, source=source)
            assert other.located() == other


def test_replace_finds_the_part() -> None:
    config = Config().replace(steps=3, learning_rate=1e-4)
    assert (config.run.steps, config.optimiser.learning_rate) == (3, 1e-4)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_kept_as_plain_ones(number: Any) -> None:
    whole = np.int64(7) if number in (np.float32, np.float64) else number(7)
    config = Config().replace(
        steps=whole,
        learning_rate=number(0.25),
        betas=(number(0.5), number(0.75)),
        shuffle=np.bool_(False),
        moments=[{"contains": "dog", "moment": number(0.5)}],
    )
    expected = Config().replace(
        steps=7,
        learning_rate=0.25,
        betas=(0.5, 0.75),
        shuffle=False,
        moments=[{"contains": "dog", "moment": 0.5}],
    )
    assert config.dump() == expected.dump()
    assert Config.read(yaml.safe_load(config.dump())) == config == expected
    with pytest.raises(ConfigError, match=r"`run\.steps` expected a whole number, got True"):
        Config().replace(steps=np.bool_(True))


def test_numbers_of_numpy_in_a_part_are_dumped_as_plain_ones() -> None:
    config = Config(run=RunConfig(steps=np.int64(7)))  # type: ignore[arg-type]
    assert config.dump() == Config().replace(steps=7).dump()


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"optimiser": {"learning_rat": 1.0}}, [], "Did you mean `optimiser.learning_rate`?"),
        ({"optimizer": {}}, [], "Did you mean `optimiser`?"),
        ({"run": {"learning_rate": 1.0}}, [], "Did you mean `optimiser.learning_rate`?"),
        ({"model": "gpt2"}, [], "`model` expected indented `key: value` lines, got 'gpt2'"),
        ({"run": {"steps": "many"}}, [], "`run.steps` expected a whole number, got many"),
        ({"run": {"steps": 0}}, [], "`run.steps` expected at least 1, got 0"),
        ({"target": {"constrain": "dog"}}, [], "`target.constrain` expected a list"),
        ({"prompts": {"source": 3}}, [], "`prompts.source` expected a text or a list of texts"),
        ({}, ["--optimiser.learning_rat", "1"], "Did you mean `--optimiser.learning_rate`?"),
        ({}, ["--lerning_rate", "1"], "Did you mean `--optimiser.learning_rate`?"),
        ({}, ["--model", "gpt2"], "--model.name"),
        ({}, ["--model.compute", "fp8"], "one of 'auto', 'fp32', 'bf16', 'fp16', got fp8"),
        ({}, ["--run.steps"], "--run.steps"),
        ({}, ["--optimiser.learning_rate=-1"], "expected a number above 0, got -1"),
        *(
            ({}, [f"--optimiser.{key}={value}"], f"`optimiser.{key}` expected {expected}, got")
            for key, value, expected in [
                ("learning_rate", ".inf", "a finite number"),
                ("learning_rate", ".nan", "a number above 0"),
                ("epsilon", ".inf", "a finite number"),
                ("weight_decay", "-0.1", "0 or more"),
                ("weight_decay", ".nan", "0 or more"),
                ("weight_decay", ".inf", "a finite number"),
                ("max_grad_norm", ".nan", "a number above 0"),
                ("betas", "[0.9, 1.0]", "two numbers of at least 0 and below 1"),
                ("betas", "[-0.1, 0.9]", "two numbers of at least 0 and below 1"),
                ("betas", "[.nan, 0.9]", "two numbers of at least 0 and below 1"),
            ]
        ),
        ({}, ["--adapter.alpha", "0"], "`adapter.alpha` expected at least 1, got 0"),
        (
            {},
            ["--objective.log_z", "batch", "--sampling.samples_per_prompt", "1"],
            "`sampling.samples_per_prompt` expected 2 and more where `objective.log_z` is batch",
        ),
        ({}, ["--optimiser.learning_rate", "nan"], "`optimiser.learning_rate` expected a number"),
    ],
)
def test_bad_input_is_named(content: dict[str, object], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config.read(content, overrides)
    assert message in str(raised.value)


def test_unknown_key_in_python_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `step`\. Did you mean `steps`"):
        Config().replace(step=3)
    with pytest.raises(ConfigError, match=r"unknown key `lr`\. Did you mean `learning_rate`"):
        Config().replace(lr=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1\n", "expected `part:` and indented"),
        ("target: {python: !!python/object/apply:os.system ['true']}", "is not YAML"),
        ("run: {steps: 3}\nrun: {seed: 1}\n", "the key `run` is there twice"),
        ("target:\n  constrain: [{contains: a, contains: b}]\n", "the key `contains` is there"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.read(path)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no recipe or file `demoo`\. Did you mean `demo`"):
        Config.read("demoo")
    with pytest.raises(ConfigError, match=r"no file `nowhere/x\.yaml`"):
        Config.read("nowhere/x.yaml")
