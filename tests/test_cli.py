"""The command line: what a person types, and what they read."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import write_tiny_model

from fdpg_fast import checkpoint, cli, scorers
from fdpg_fast._version import __version__
from fdpg_fast.attention import attention_report
from fdpg_fast.progress import show_table
from fdpg_fast.run_directory import RunDirectory


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Two seconds of plots for each run are only drawn where they are looked at."""
    if "report" not in request.node.name:
        monkeypatch.setattr("fdpg_fast.trainer.write_report", lambda runs, path: path)
        monkeypatch.setattr("fdpg_fast.evaluation.write_report", lambda runs, path: path)


SMALL = [
    *("--sampling.max_new_tokens", "6"),
    *("--sampling.samples_per_prompt", "16"),
    *("--run.evaluation_samples", "32"),
    *("--prompts.source", "once there"),
]


def train(model: Path, out: Path, *more: str, steps: int = 3) -> int:
    words = ["train", "dog", "--model.name", str(model), *SMALL, "--run.steps", str(steps)]
    return cli.main([*words, "--out", str(out), *more])


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dogs"
    assert train(model, out) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one message of a command that cannot be."""
    assert cli.main(list(words)) == 2
    seen = capsys.readouterr()
    assert "Traceback" not in seen.err
    assert seen.err.startswith("fdpg: ")
    return seen.err


# ---- help ------------------------------------------------------------------------------------


def test_help_is_quick_to_come() -> None:
    """It imports neither torch nor transformers."""
    code = (
        "import sys; from fdpg_fast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("train", "sweep", "sample", "evaluate", "report", "env"):
        assert re.search(rf"^    {command} ", done.stdout, flags=re.MULTILINE)


def test_python_m_is_the_same_command() -> None:
    words = [sys.executable, "-m", "fdpg_fast", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"fdpg-fast {__version__}"


def test_train_help_lists_recipes_divergences_baselines_scorers_and_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fdpg_fast.baselines import BASELINES
    from fdpg_fast.config import Config, recipes
    from fdpg_fast.divergences import DIVERGENCES

    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in (*DIVERGENCES, *BASELINES, *recipes()):
        assert re.search(rf"^  {name}\b", text, flags=re.MULTILINE), name
    for name, build in scorers.SCORERS.items():
        listed = text.partition(f"\n  {name}: ")[2].partition("\n  ")[0]
        for option in list(inspect.signature(build).parameters)[1:]:
            assert re.search(rf"\b{option}\b", listed), (name, option)
    for part, key, _ in Config()._items():
        assert f"--{part}.{key} [" in text


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "fdpg train demo" in capsys.readouterr().out


def test_env_says_what_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("fdpg_fast", "torch", "CPU instructions", "attention: ", "CUDA"):
        assert word in text
    for name, available, why in attention_report():
        how = "available" if available else "not available"
        assert re.search(rf"^attention: {name} +{how}: {re.escape(why)}$", text, re.MULTILINE)
    values = [re.search(r"(?<=  )(\S|$)", line) for line in text.splitlines()]
    assert len({value and value.start() for value in values}) == 1  # one column


# ---- a whole run ---------------------------------------------------------------------------------


def test_train_ends_with_a_table_samples_and_the_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, tmp_path / "run", "--run.table_every", "2") == 0
    text = capsys.readouterr().out
    assert "step 3/3" in text
    for word in ("samples/s (sample", "goal 1", "KL to base", "entropy/token", "ESS", "gap", "±"):
        assert word in text
    assert "samples of step 2: log a | log P | log pi | weight" in text
    assert re.search(r"^contains .dog. .*±.* ±.* +1$", text, re.M)
    table = text.partition("fresh samples ")[2].partition("base:\n")[0]
    assert "distinct-1" in table
    assert "…" not in table  # numbers are whole
    before, after = text.index("base:\n"), text.index("tuned:\n")
    assert text[before:after].count("once there") == 3
    assert text[after:].count("once there") == 3
    assert text.strip().endswith(str(tmp_path / "run" / "report.html"))
    assert (tmp_path / "run" / "report.html").is_file()


def test_sample_draws_new_texts_or_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def texts(*more: str) -> list[dict[str, str]]:
        assert cli.main(["sample", str(run), "-n", "4", "--jsonl", *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [text["prompt"] for text in texts()] == ["once there"] * 4
    assert texts("--seed", "1") == texts("--seed", "1") != texts("--seed", "2")
    assert texts("--prompt", "the cat")[0]["prompt"] == "the cat"
    said = refused(capsys, "sample", str(run), "--prompt", "a.csv")
    assert "a text, or one of .txt, .jsonl. For the name as a prompt, make it a line" in said
    assert cli.main(["sample", str(run)]) == 0
    assert capsys.readouterr().out.count("once there") >= 3


def test_evaluate_measures_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--samples", "24", "--seed", "5"]) == 0
    assert "24 fresh samples" in capsys.readouterr().out
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (evaluation["samples"], evaluation["seed"]) == (24, 5)
    for name in ("kl", "reverse_kl", "tv", "js", "kl_to_base", "entropy", "distinct_2", "length"):
        assert len(evaluation["tuned"][name]) == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_no_number_of_a_table_is_cut_at_80_columns(terminal: bool) -> None:
    number, label = "-0.691 ± 0.021 *", "all: error of the samples"
    header = ["trained on", *["alpha(0.9)"] * (3 if terminal else 8)]
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal)
    show_table(console, "title", header, [[label, *[number] * (len(header) - 1)]])
    said = out.getvalue()
    assert said.count("alpha(0.9)") == said.count(number) == len(header) - 1
    assert label in said
    if terminal:
        assert max(map(len, said.splitlines())) <= 80
        narrow = Console(file=io.StringIO(), width=40, force_terminal=True)
        show_table(narrow, "title", header, [[label, *[number] * 3]])
        assert narrow.file.getvalue().count(number) == 3  # type: ignore[attr-defined]


def test_evaluate_draws_other_samples_than_before(run: Path, tmp_path: Path) -> None:
    """And every file of the run tells of these."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    seen = [json.loads((again / "evaluation.json").read_text())]
    for _ in range(2):
        assert cli.main(["evaluate", str(again)]) == 0
        seen.append(json.loads((again / "evaluation.json").read_text()))
    first, second, third = (one["texts"]["tuned"] for one in seen)
    assert first != second != third
    assert [one["seed"] - seen[0]["seed"] for one in seen] == [0, 1, 2]
    tables = [
        (again / card).read_text().split("## ")[1] for card in ("README.md", "model/README.md")
    ]
    assert tables[0] == tables[1]


def test_report_compares_runs(
    model: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "slow"
    assert train(model, other, "--optimiser.learning_rate", "1e-6") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["report", str(run), str(other)]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    assert "dogs vs slow" in page


def test_resume_needs_only_the_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(model, out, steps=2) == 0
    assert cli.main(["train", "--resume", "--out", str(out), "--run.steps", "4"]) == 0
    assert "step 4/4" in capsys.readouterr().out
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_resume_goes_on_where_the_recipe_has_moved_to(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a recipe is not a setting; what the recipe says is."""
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    here.mkdir()
    (here / "mine.py").write_text("def dog(texts):\n    return ['dog' in x for x in texts]\n")
    (here / "prompts.txt").write_text("once there\n")
    recipe = {
        "target": {"constrain": [{"python": "mine.py:dog", "kind": "boolean"}]},
        "prompts": {"source": "prompts.txt"},
        "sampling": {"max_new_tokens": 6, "samples_per_prompt": 32},
        "run": {"evaluation_samples": 0, "steps": 2},
    }
    (here / "mine.yaml").write_text(json.dumps(recipe))
    words = ("--model.name", str(model), "--out", str(out))
    assert cli.main(["train", str(here / "mine.yaml"), *words, "--run.steps", "1"]) == 0
    here.rename(there)
    capsys.readouterr()
    assert "(target.folder)" in refused(capsys, "train", "--resume", "--out", str(out))
    moved = ("train", str(there / "mine.yaml"), *words, "--resume")
    for key, value in [("prompts.source", "a cat"), ("target.smooth", "1e-6")]:
        assert f"another {key}. Way out" in refused(capsys, *moved, f"--{key}", value)
    assert cli.main(list(moved)) == 0
    assert "step 2/2" in capsys.readouterr().out
    assert RunDirectory.open(out).config().target.folder == str(there)


def test_a_run_of_relative_paths_is_used_from_any_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    write_tiny_model(here / "model")
    (here / "prompts.txt").write_text("once there\n")
    (here / "elsewhere").mkdir()
    files = ("--prompts.source", "prompts.txt", "--model.name", "model")
    words = ("train", "dog", *SMALL, *files, "--run.checkpoint_every", "1", "--out", "run")
    monkeypatch.chdir(here)
    assert cli.main([*words, "--run.steps", "1"]) == 0
    monkeypatch.chdir(here / "elsewhere")
    assert cli.main(["sample", "../run", "-n", "1"]) == 0
    assert cli.main(["evaluate", "../run"]) == 0
    assert cli.main(["train", "--resume", "--out", "../run", "--run.steps", "2"]) == 0
    monkeypatch.chdir(here)
    assert cli.main([*words, "--run.steps", "3", "--resume"]) == 0

    monkeypatch.chdir(tmp_path)
    there = here.rename(tmp_path / "there")
    capsys.readouterr()
    said = refused(capsys, "evaluate", "there/run")
    assert f"model '{here / 'model'}': no such folder" in said
    assert "has moved, say where to in its config.yaml" in said
    config = there / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(here / "model"), str(there / "model")))
    said = refused(capsys, "sample", "there/run")
    assert f"cannot read {here / 'prompts.txt'}" in said
    assert "have moved, say where to in its config.yaml" in said
    config.write_text(text.replace(str(here), str(there)))
    assert cli.main(["sample", "there/run", "-n", "1"]) == 0
    assert cli.main(["evaluate", "there/run"]) == 0


@pytest.mark.parametrize("second", [None, "at once", "saved"])
def test_ctrl_c_saves_and_a_second_one_leaves_at_once(
    model: Path, tmp_path: Path, second: str | None
) -> None:
    """Also a second one that comes when all is saved and the interpreter is ending."""
    out = tmp_path / "run"
    words = ["train", "dog", "--model.name", str(model), *SMALL, "--run.steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fdpg_fast", *words, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    if second == "at once":
        time.sleep(0.01)  # two signals at once would be one
        process.send_signal(signal.SIGINT)
    elif second == "saved":
        for line in process.stdout:
            if line.startswith("saved after step"):
                break
        for _ in range(200):
            process.send_signal(signal.SIGINT)  # none once it has ended
            time.sleep(0.005)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    if second != "at once":
        run = RunDirectory.open(out)
        newest = checkpoint.latest(run.checkpoints)
        assert newest is not None
        last = run.read("metrics.jsonl")[-1]["step"]
        assert checkpoint.load(newest).step == last


def test_a_yaml_file_with_a_python_scorer_beside_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def dogs(texts): return [t.count('dog') for t in texts]\n")
    (tmp_path / "mine.yaml").write_text(
        "target:\n  reward: {python: 'mine.py:dogs', beta: 0.5}\n"
        f"model: {{name: {model}}}\nobjective: {{divergence: reverse_kl}}\n"
    )
    out = str(tmp_path / "run")
    words = ["train", str(tmp_path / "mine.yaml"), *SMALL, "--run.steps", "2", "--out", out]
    assert cli.main(words) == 0
    assert cli.main(["evaluate", out, "--samples", "16"]) == 0  # finds mine.py again


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian"),
        (["train"], "expected a recipe or a YAML file"),
        (["train", "dgo", "--out", "x"], "Did you mean `dog`"),
        (["train", "dog"], "expected --out DIR"),
        (["train", "dog", "--out", "x", "--run.stesp", "3"], "Did you mean `--run.steps`"),
        (["train", "dog", "--out", "x", "--run.steps", "three"], "a whole number, got three"),
        (["train", "--resume", "--out", "nowhere"], "no folder nowhere"),
        (["train", "dog", "--out", "x", "--objective.divergence", "jsd"], "Did you mean 'js'"),
        (["train", "dog", "--out", "x", "--objective.divergence", "reverse_kl"], "--target.smooth"),
        (["train", "dog", "--out", "x", "--target.constrain", "[{contain: a}]"], "contains"),
        (["train", "dog", "--out", "x", "--prompts.source", "no.txt"], "cannot read no.txt"),
        (["sweep", "dog", "--out", "x", "--objective.divergence", "kl"], "Way out: --divergences"),
        (["sweep", "dog", "--out", "x", "--objective.divergence=kl"], "Way out: --divergences"),
        (["train", "dog", "--out", ""], "--out: expected a path, got an empty name"),
        (["sample", ""], "DIR: expected a path, got an empty name"),
        (["sample", "nowhere"], "no folder nowhere"),
        (["sample", "nowhere", "-n", "0"], "-n"),
        (["evaluate", "nowhere"], "no folder nowhere"),
        (["report", "nowhere"], "no folder nowhere"),
        (["report"], "DIR"),
        (["env", "extra"], "extra"),
    ],
)
def test_a_mistake_gives_one_message(
    model: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[:2] == ["train", "dog"]:
        words = [*words, "--model.name", str(model)]
    said = refused(capsys, *words)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_says_what_to_make_smaller(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(known: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")

    monkeypatch.setattr(cli, "env", allocate)
    said = refused(capsys, "env")
    assert "Tried to allocate 2.00 GiB" in said
    assert "--optimiser.micro_batch" in said


def test_a_fault_of_the_program_is_not_called_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(known: object) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "env", fail)
    with pytest.raises(KeyError):
        cli.main(["env"])


def test_a_target_built_in_python_is_evaluated_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fdpg_fast as fdpg

    out = tmp_path / "run"
    target = fdpg.load(str(model)).constrain({fdpg.contains("dog"): 1.0})
    fdpg.Trainer(
        target,
        prompts="once",
        out=out,
        steps=1,
        samples_per_prompt=8,
        max_new_tokens=4,
        evaluation_samples=0,
    ).train()
    capsys.readouterr()
    assert "built in Python" in refused(capsys, "evaluate", str(out))
    assert "built in Python" in refused(capsys, "train", "--resume", "--out", str(out))
    assert cli.main(["sample", str(out)]) == 0  # needs no target


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from fdpg_fast.run_directory import RunDirectoryError

    with pytest.raises(RunDirectoryError):
        cli.main(["--debug", "sample", str(tmp_path / "nowhere")])


def test_a_model_that_is_not_there_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["train", "dog", "--model.name", str(tmp_path / "nowhere"), "--out", "x"]
    assert "no such folder" in refused(capsys, *words)


def test_folders_that_cannot_be_used(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_into(out: Path) -> str:
        words = ["train", "dog", "--model.name", str(model), *SMALL, "--out", str(out)]
        return refused(capsys, *words)

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    assert "something else" in train_into(tmp_path / "thesis")
    assert "--resume" in train_into(run)
    assert "a file" in train_into(tmp_path / "thesis" / "chapter.tex")
    assert "cannot write" in train_into(Path("/proc/nowhere"))
    assert "no config.yaml" in refused(capsys, "evaluate", str(tmp_path / "thesis"))
    (tmp_path / "thesis" / "config.yaml").write_text("objective: [\n")
    assert "it is damaged" in refused(capsys, "evaluate", str(tmp_path / "thesis"))


def test_half_a_run_has_no_model_to_sample(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert train(model, tmp_path / "run", steps=1) == 0
    shutil.rmtree(tmp_path / "run" / "model")
    capsys.readouterr()
    assert "has no model/ yet" in refused(capsys, "sample", str(tmp_path / "run"))
    assert "has no model/ yet" in refused(capsys, "evaluate", str(tmp_path / "run"))


def test_a_damaged_checkpoint_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(model, out, steps=1) == 0
    weights = out / "checkpoints" / "step-000001" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    said = refused(capsys, "train", "--resume", "--out", str(out), "--run.steps", "2")
    assert "policy.safetensors" in said
    assert "Way out" in said
