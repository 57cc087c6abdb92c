"""A sweep: what it trains and what it leaves alone, and that its table is what it says it is."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from test_report import Page
from tiny import write_tiny_model

from fdpg_fast import cli, ops, reference, sweep_report
from fdpg_fast.building import model_of, prompts_of, target_of
from fdpg_fast.divergences import Divergence
from fdpg_fast.evaluation import STREAM
from fdpg_fast.models import LanguageModel
from fdpg_fast.rollout import PromptBatch, Rollout
from fdpg_fast.run_directory import RunDirectory
from fdpg_fast.sampler import Sampler, SamplingError
from fdpg_fast.trainer import Trainer

STEPS, SAMPLES = 3, 64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True, scope="module")
def no_plots_of_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fdpg_fast.trainer.write_report", lambda runs, path: path)
        patch.setattr("fdpg_fast.sweep.write_report", lambda runs, path: path)
        yield


def sweep(model: Path, out: Path, *more: str, recipe: str = "dog") -> int:
    return cli.main(
        [
            *("sweep", recipe, "--model.name", str(model), "--prompts.source", "once there"),
            *("--sampling.max_new_tokens", "6", "--sampling.samples_per_prompt", "32"),
            *("--run.steps", str(STEPS), "--run.evaluation_samples", str(SAMPLES)),
            *("--optimiser.learning_rate", "3e-2", "--run.checkpoint_every", "1"),
            *("--out", str(out), *more),
        ]
    )


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "dogs"
    assert sweep(model, out, "--divergences", "kl,alpha(0.5)", "--seeds", "2") == 0
    return out


@pytest.fixture(scope="module")
def measured(swept: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((swept / "measured.json").read_text())
    return content


def weights(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.glob("*/*/model/model.safetensors"))
    }


def test_every_cell_is_a_run_of_its_own(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(set(weights(swept).values())) == 4
    for folder in ("kl/0", "kl/1", "alpha-0.5/0", "alpha-0.5/1"):
        run = RunDirectory.open(swept / folder)
        assert [record["step"] for record in run.read("metrics.jsonl")] == [1, 2, 3]
        assert run.config().objective.divergence == folder.split("/")[0].replace("-0.5", "(0.5)")
        assert cli.main(["sample", str(run.path), "-n", "1", "--seed", "0"]) == 0
        evaluation = run.read_json(run.evaluation)
        assert evaluation is not None
        assert evaluation["tuned"]["length"][0] > 0


def test_every_entry_is_an_estimate_on_the_samples_of_all(
    swept: Path, measured: dict[str, Any]
) -> None:
    """Written out again, from the models in the folders and the definition."""
    config = RunDirectory.open(swept / "kl" / "0").config()
    target = target_of(config)
    folders = [swept / f / s / "model" for f in ("kl", "alpha-0.5") for s in ("0", "1")]
    models = [target.base.model, *[model_of(config, folder) for folder in sorted(folders)]]
    prompts = prompts_of(config, target.base.model).all()
    key = ops.random_key(0, 0, STREAM)
    rollouts = [Sampler(6).draw(m, prompts, SAMPLES, key) for m in models]
    log_pi = torch.stack([torch.cat([m.sequence_logprob(r) for r in rollouts]) for m in models])
    log_mixture = log_pi.logsumexp(0) - math.log(len(models))
    log_score = torch.cat([target.log_score(r) for r in rollouts])
    log_z = (log_score - log_mixture).exp().mean().log()
    assert measured["target"]["log_z"][0] == pytest.approx(log_z.item(), abs=1e-5)
    names = [("alpha(0.5)", "0"), ("alpha(0.5)", "1"), ("kl", "0"), ("kl", "1")]  # as sorted
    for row, (name, seed) in enumerate(names, start=1):
        for column in ("kl", "tv", "js", "alpha(0.5)"):
            g = Divergence.parse(column)
            formula = reference.FORMULAS[g.name]
            on = log_score > -math.inf
            t = (log_pi[row] - log_score + log_z)[on].exp()
            slope = formula.f_prime(torch, torch.ones(1).double(), g.param)
            terms = torch.zeros_like(log_score)
            terms[on] = (log_score - log_z - log_mixture)[on].exp() * (
                formula.f(torch, t, g.param) - slope * (t - 1)
            )
            off = (log_pi[row] - log_mixture)[~on].exp() * (formula.f_prime_inf(g.param) - slope)
            terms[~on] = off
            value, error = measured["runs"][name][seed][column]
            assert value == pytest.approx(terms.mean().item(), abs=1e-5)
            assert 0 < error < 0.5
        assert measured["runs"][name][seed]["reverse_kl"][0] == "inf"
        assert 0 < measured["runs"][name][seed]["off_support"][0] < 1


def every_text(model: LanguageModel, prompts: PromptBatch) -> Rollout:
    """All that a model can write of two words or fewer, as if drawn from it."""
    words = range(1, model.vocab_size)
    samples = [(0,), *itertools.product(words, range(model.vocab_size))]  # 0 ends a text
    (prompt,) = prompts.tokens
    count = len(samples)
    zeros = torch.zeros(count, 2)
    return Rollout(
        tokens=torch.tensor([[*prompt, *(*sample, 0)[:2]] for sample in samples]),
        prompt_lengths=torch.full((count,), len(prompt)),
        lengths=torch.tensor([len(sample) for sample in samples]),
        prompt_index=torch.zeros(count, dtype=torch.int64),
        sample_ids=torch.arange(count),
        token_logprob=zeros,
        lse=zeros,
        log_q=zeros[:, 0].double(),
        finish=torch.zeros(count, dtype=torch.int8),
        prompts=prompts,
        texts=tuple(model.decode(samples)),
    )


def test_the_table_is_the_exact_one_within_its_errors(model: Path, tmp_path: Path) -> None:
    """Of samples of two words, all of which can be written out: trained on f, measured by g."""
    out = tmp_path / "exact"
    words = ("--sampling.max_new_tokens", "2", "--run.evaluation_samples", "1024")
    words += ("--target.smooth", "0.01", "--divergences", "reverse_kl,js")
    assert sweep(model, out, *words) == 0
    measured = json.loads((out / "measured.json").read_text())
    config = RunDirectory.open(out / "js" / "0").config()
    target = target_of(config)
    base = target.base.model
    texts = every_text(base, prompts_of(config, base).all())
    log_score = target.log_score(texts)
    log_z = log_score.logsumexp(0).item()
    p = log_score.softmax(0)
    estimates = [(measured["target"]["log_z"], log_z)]
    models = {"reverse_kl": model_of(config, out / "reverse_kl" / "0" / "model")}
    models |= {"js": model_of(config, out / "js" / "0" / "model"), "base": base}
    for name, one in models.items():
        log_pi = one.sequence_logprob(texts)
        assert log_pi.exp().sum().item() == pytest.approx(1, abs=1e-5), "no text is missing"
        row = measured["base"] if name == "base" else measured["runs"][name]["0"]
        for column in ("kl", "reverse_kl", "tv", "js"):
            g = Divergence.parse(column)
            values = reference.FORMULAS[column].f(torch, (log_pi - p.log()).exp(), g.param)
            estimates.append((row[column], (p * values).sum().item()))
    for (value, error), exact in estimates:
        assert abs(value - exact) < 2 * error
        assert error < 0.1 * max(abs(exact), 0.5)


def test_the_same_again_does_nothing_and_more_adds(
    model: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dogs"
    shutil.copytree(swept, out)
    (out / "measured.json").write_text(
        (out / "measured.json").read_text().replace('"samples": 64', '"samples": 63')
    )
    assert cli.main(["sweep", "--out", str(out)]) == 0  # as it was planned
    assert "run 1 of" not in capsys.readouterr().out
    assert json.loads((out / "measured.json").read_text())["samples"] == 63  # not measured again
    assert weights(out) == weights(swept)
    assert cli.main(["sweep", "--out", str(out), "--divergences", "kl,js", "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    assert "run 1 of 1: js, seed 0" in said
    assert set(json.loads((out / "measured.json").read_text())["runs"]) == {"kl", "js"}
    assert weights(out).items() > weights(swept).items()


def test_stopped_and_gone_on_with_it_is_the_same_sweep(
    model: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dogs"
    words = ("--divergences", "kl,alpha(0.5)", "--seeds", "2")
    step = Trainer.step

    def stop_in_the_second_run(trainer: Trainer) -> None:
        step(trainer)
        if trainer.run is not None and trainer.run.path.parent.name == "alpha-0.5":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stop_in_the_second_run)
        handler = signal.getsignal(signal.SIGINT)
        assert sweep(model, out, *words) == 130
        signal.signal(signal.SIGINT, handler)  # the command leaves its own: it was to end there
    assert f"fdpg sweep --out {out}" in capsys.readouterr().out
    assert list(weights(out)) == ["kl/0/model/model.safetensors"]
    assert sweep(model, out, *words) == 0
    assert "run 1 of 3: alpha(0.5), seed 0" in capsys.readouterr().out
    assert weights(out) == weights(swept)
    ours, theirs = (json.loads((o / "measured.json").read_text()) for o in (out, swept))
    for name, runs in theirs["runs"].items():
        for seed, measures in runs.items():
            del measures["seconds"], ours["runs"][name][seed]["seconds"]
    assert ours == theirs


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft 0.21
def test_adapters_are_trained_and_measured_over_one_base(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft", reason="needs the optional package peft")
    loaded, load = [], LanguageModel.load

    def counting(name: str, **settings: Any) -> LanguageModel:
        loaded.append(str(name))
        return load(name, **settings)

    out = tmp_path / "adapters"
    words = ("--divergences", "kl,js", "--adapter.peft", "lora")
    monkeypatch.setattr(LanguageModel, "load", counting)
    assert sweep(model, out, *words) == 0
    assert loaded == [str(model)]
    assert weights(out) == {}, "the base's weights are not written"
    measured = json.loads((out / "measured.json").read_text())
    values = [measured["base"]["js"][0]]
    values += [measured["runs"][name]["0"]["js"][0] for name in ("kl", "js")]
    assert len(set(values)) == 3, "each has its own adapter, and the base has none"

    # The same numbers come from models that were loaded whole.
    monkeypatch.setattr("fdpg_fast.sweep.tuned_of", lambda config, at, base: model_of(config, at))
    (out / "measured.json").unlink()
    capsys.readouterr()
    assert cli.main(["sweep", "--out", str(out)]) == 0
    assert "run 1 of" not in capsys.readouterr().out, "what is trained is not trained again"
    assert len(loaded) == 1 + 1 + 2 * 2  # the base; it again; and as often as they are used
    assert json.loads((out / "measured.json").read_text()) == measured


def test_other_settings_are_refused_by_name(
    model: Path, swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(swept)
    assert sweep(model, swept, "--optimiser.learning_rate", "1e-3", "--seeds", "3") == 2
    said = capsys.readouterr().err
    assert "kl/0 was started with another optimiser.learning_rate." in said
    assert weights(swept) == before
    assert not (swept / "kl" / "2").exists()


def test_a_first_run_that_never_began_is_mended_in_its_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "fdpg_fast.sweep.write_sweep_report", lambda *what: None
    )  # seconds of plots
    recipe, run = tmp_path / "mine.yaml", RunDirectory(tmp_path / "out" / "js" / "0")

    def swept(moment: float) -> int:
        recipe.write_text(f"target: {{moments: [{{contains: dog, moment: {moment}}}]}}")
        return sweep(model, tmp_path / "out", "--divergences", "js", recipe=str(recipe))

    def fail(trainer: Trainer) -> None:
        raise SamplingError("stop: raised")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fail)
        assert swept(0.4) == 2
    fitted = run.read_facts()["lambdas"]["contains 'dog'"]
    assert swept(0.6) == 0
    assert run.read_facts()["lambdas"]["contains 'dog'"] > fitted + 0.5
    capsys.readouterr()
    assert swept(0.4) == 2
    assert "js/0 was started with another target.moments" in capsys.readouterr().err


def test_it_goes_on_where_its_recipe_has_moved_to(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    here.mkdir()
    (here / "prompts.txt").write_text("once there\n")
    target = {"constrain": [{"contains": "dog"}]}
    recipe = {"target": target, "prompts": {"source": "prompts.txt"}}
    (here / "mine.yaml").write_text(json.dumps(recipe))
    words = ["--model.name", str(model), "--sampling.max_new_tokens", "6", "--run.steps", "1"]
    words += ["--run.evaluation_samples", str(SAMPLES), "--divergences", "kl", "--out", str(out)]
    assert cli.main(["sweep", str(here / "mine.yaml"), *words]) == 0
    here.rename(there)
    capsys.readouterr()
    assert cli.main(["sweep", str(there / "mine.yaml"), *words, "--seeds", "2"]) == 0
    assert "run 1 of 1: kl, seed 1" in capsys.readouterr().out


def test_what_is_infinite_on_the_target_is_refused_before_anything(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sweep(model, out, "--divergences", "kl,reverse_kl,jeffreys") == 2
    said = capsys.readouterr().err
    assert "reverse_kl, jeffreys cannot be minimised" in said
    assert "--divergences kl)" in said
    assert "--target.smooth" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective.baseline", "analytic", "--divergences", "kl,tv"], "kl only"),
        (["--prompts.source", "gone.txt"], "cannot read gone.txt"),
        (["--adapter.peft", "lroa"], "peft has no such kind"),
        (["--out", "taken"], "holds files of something else"),
    ],
)
def test_a_mistake_is_found_before_a_model_is_loaded(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    assert sweep(tmp_path / "gone", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep"], "expected --out DIR"),
        (["sweep", "--out", "nowhere"], "no sweep.yaml"),
        (["sweep", "dgo", "--out", "x"], "Did you mean `dog`"),
        (["sweep", "dog", "--divergences", "jsd", "--out", "x"], "Did you mean 'js'"),
        (["sweep", "dog", "--divergences", "kl,js,kl", "--out", "x"], "once, got kl again"),
        (
            ["sweep", "dog", "--divergences", "alpha(0.5),alpha(.50)", "--out", "x"],
            "once, got alpha(0.5) again. Way out",
        ),
        (["sweep", "dog", "--seeds", "0", "--out", "x"], "--seeds"),
        (["sweep", "dog", "--run.stesp", "3", "--out", "x"], "Did you mean `--run.steps`"),
    ],
)
def test_a_mistake_gives_one_message(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_moments_are_fitted_once_for_all(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "females"
    more = ("--divergences", "js", "--seeds", "2", "--target.fit_samples", "512")
    monkeypatch.chdir(model.parent)
    assert sweep(Path(model.name), out, *more, recipe="half_female") == 0
    first, second = (RunDirectory.open(out / "js" / s).read_facts()["lambdas"] for s in "01")
    assert first == second != {}
    # And by a later call, from what is there, in another folder.
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", "--out", str(out), "--seeds", "3"]) == 0
    assert RunDirectory.open(out / "js" / "2").read_facts()["lambdas"] == first


def test_the_report_is_one_file_with_all_of_it(swept: Path, measured: dict[str, Any]) -> None:
    page = Page((swept / "report.html").read_text(encoding="utf-8"))
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert page.open == []
    # The feature and js against entropy; the feature, three finite divergences, five other curves.
    assert len(page.links) == 2 + 1 + 3 + 5
    text = (swept / "report.md").read_text(encoding="utf-8")
    values = [measured["runs"]["kl"][seed]["js"][0] for seed in "01"]
    mean, error = sum(values) / 2, abs(values[0] - values[1]) / 2  # s / sqrt(2), of two
    for words in (f"{mean:.3f} ± {error:.3f}", "∞", "self-BLEU", "log Z is one number", "2 seeds"):
        assert words in page.words
        assert words in text
    for prompt, sample in zip(measured["texts"]["prompt"], measured["texts"]["kl"], strict=True):
        assert prompt in page.words
        assert sample.strip() in page.words


def test_with_many_prompts_it_says_how_often_one_of_several_samples_passes(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dogs"
    more = ("--divergences", "kl,tv", "--prompts.source", "[once there, a cat]", "--run.steps", "1")
    assert sweep(model, out, *more) == 0
    measured = json.loads((out / "measured.json").read_text())
    dog = "contains 'dog'"
    for numbers in (measured["base"], measured["runs"]["kl"]["0"]):
        assert numbers[f"pass@1: {dog}"] == pytest.approx(numbers[f"moment: {dog}"])
        assert numbers[f"pass@1: {dog}"][0] < numbers[f"pass@4: {dog}"][0]
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert f"pass@16: {dog}" in page.words
    assert len(page.links) == 2 + 1 + 1 + 3 + 5  # one more plot: pass@1 against pass@16
    assert "no model drew" not in page.words


def test_it_says_which_prompts_tell_nothing_of_the_target(model: Path, tmp_path: Path) -> None:
    scorer = tmp_path / "mine.py"
    scorer.write_text(
        "def dog(texts, prompts):\n"
        "    return ['dog' in x and 'cat' not in p for x, p in zip(texts, prompts)]\n"
    )
    constrain = json.dumps([{"python": f"{scorer}:dog", "kind": "boolean"}])
    more = ("--target.constrain", constrain, "--run.steps", "1", "--divergences", "kl")
    out = tmp_path / "dogs"
    assert sweep(model, out, *more, "--prompts.source", "[once there, a cat, the moon]") == 0
    for report in ("report.html", "report.md"):
        text = (out / report).read_text(encoding="utf-8")
        assert "For 1 of 3 prompts no model drew a sample that the target allows" in text


@pytest.mark.filterwarnings("error")  # matplotlib's, of an axis that cannot be
def test_a_step_that_a_seed_knows_nothing_of_is_drawn_by_the_others(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a step that no seed knows anything of is not drawn."""
    out = tmp_path / "dogs"
    shutil.copytree(swept, out)
    for seed, unknown in (("0", (1, 3)), ("1", (2, 3))):
        path = out / "kl" / seed / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record["reward_std"] = 0.0
            if record["step"] in unknown:
                record["js"] = None
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.rmtree(out / "alpha-0.5")
    measured = json.loads((out / "measured.json").read_text())
    del measured["runs"]["alpha(0.5)"]
    drawn: dict[str, list[float]] = {}
    draw = sweep_report._draw_curve

    def watched(axes: Axes, *, key: str, **more: Any) -> None:
        draw(axes, key=key, **more)
        drawn[key] = list(axes.lines[0].get_xdata())

    monkeypatch.setattr(sweep_report, "_draw_curve", watched)
    runs = {("kl", int(s)): RunDirectory.open(out / "kl" / s) for s in "01"}
    sweep_report.write_sweep_report(RunDirectory(out), measured, runs)
    assert drawn["js"] == [1, 2]
    assert drawn["tv"] == [1, 2, 3]


def test_the_csv_has_every_number(swept: Path, measured: dict[str, Any]) -> None:
    with (swept / "measured.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    found = {(r["trained_on"], r["seed"], r["measure"]): r["value"] for r in rows}
    assert len(found) == len(rows)
    for name, runs in measured["runs"].items():
        for seed, measures in runs.items():
            for key, (value, _) in measures.items():
                assert found[name, seed, key] == ("" if value is None else str(value))
