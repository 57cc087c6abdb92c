"""The report and the card: they hold the numbers of the run, and need nothing from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fdpg_fast.config import Config
from fdpg_fast.report import evaluation_table, model_card, write_card, write_report
from fdpg_fast.run_directory import RunDirectory, RunDirectoryError

EVALUATION: dict[str, Any] = {
    "samples": 64,
    "seed": 0,
    "goals": {"contains 'dog'": 1.0},
    "target": {"kl_to_base": [3.7, None], "moment: contains 'dog'": [1.0, 0.0]},
    "base": {"moment: contains 'dog'": [0.03, 0.01], "kl": [3.6, 0.1], "reverse_kl": ["inf", None]},
    "tuned": {
        "moment: contains 'dog'": [0.9, 0.02],
        "kl": [0.2, 0.1],
        "reverse_kl": ["inf", None],
        "kl_to_base": [3.9, 0.1],
        "pass@4: contains 'dog'": [0.95, 0.02],
        "distinct_3": [float("nan"), None],
    },
    "texts": {
        "prompt": ["Once"],
        "base": [" upon a <b>time</b>"],
        "tuned": [" there was a dog & a cat"],
    },
}

GAPS = {
    **{"gap_mean": 1e-7, "gap_p99": 2e-7, "gap_max": 4e-7},
    **{"gap_sequence_mean": 1e-6, "gap_sequence_p99": 3e-6, "gap_sequence_max": 5e-6},
}


def make_run(folder: Path, steps: int = 3, **settings: Any) -> RunDirectory:
    run = RunDirectory.create(folder, Config().replace(**settings))
    run.write_json(
        run.facts,
        {
            "versions": {"fdpg_fast": "0", "torch": "2"},
            "device": "cpu",
            "model": "tiny <model>",
            "target": "a(x) · [contains 'dog']",
            "goals": {"contains 'dog'": 1.0},
            "baseline": "loo",
        },
    )
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "moment: contains 'dog'": step / 10,
            "moment_se: contains 'dog'": 0.01,
            **{k: 1.0 / step for k in ("kl", "tv", "js", "kl_to_base", "kl_target_base")},
            **{f"{k}_se": 0.1 for k in ("kl", "tv", "js", "kl_to_base", "log_z")},
            "reverse_kl": float("inf"),
            "reverse_kl_se": float("nan"),
            **{k: 1.0 for k in ("entropy_per_token", "log_z", "target_ess", "length", "grad_norm")},
            **GAPS,
        }
        for step in range(1, steps + 1)
    ]
    run.append("metrics.jsonl", records)
    seconds = {"samples": 8, "sample": 1.0, "score": 0.5, "train": 2.5}
    run.append("timing.jsonl", [{"step": step, **seconds} for step in range(1, steps + 1)])
    run.write_json(run.evaluation, EVALUATION)
    return run


class Page(HTMLParser):
    """What a browser would fetch, and what a person would read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = make_run(tmp_path_factory.mktemp("runs") / "dogs")
    return Page(write_report([run], run.report).read_text(encoding="utf-8"))


def test_it_is_one_file(page: Page) -> None:
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert page.open == []


def test_it_has_the_plots_of_the_paper_and_of_the_run(page: Page) -> None:
    # a moment, four divergences, KL to base, entropy, log Z, ESS, length, norm, two gaps, seconds
    assert len(page.links) == 14


def test_the_gap_is_drawn_per_token_and_per_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean, 99th percentile and maximum of each."""
    drawn: dict[str, float] = {}

    def plot(title: str, draw: Callable[[Axes], None]) -> str:
        axes = Figure().add_subplot()
        draw(axes)
        if title.startswith("sampler vs trainer"):
            unit = title.split()[-1]
            drawn.update({f"{x.get_label()} per {unit}": x.get_ydata()[0] for x in axes.lines})
        return ""

    monkeypatch.setattr("fdpg_fast.page.plot", plot)
    run = make_run(tmp_path / "run")
    write_report([run], run.report)
    parts = [
        f"{part} per {unit}" for unit in ("token", "sample") for part in ("mean", "p99", "max")
    ]
    assert drawn == dict(zip(parts, GAPS.values(), strict=True))


def test_it_shows_numbers_samples_and_settings(page: Page) -> None:
    for words in ("0.900 ± 0.020", "3.900 ± 0.100", "∞", "tiny <model>", "learning_rate: 3.0e-05"):
        assert words in page.words
    assert " upon a <b>time</b>" in page.words  # as text, not as markup
    assert " there was a dog & a cat" in page.words


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / a / "run", divergence=d) for a, d in (("x", "js"), ("y", "kl"))]
    page = Page(write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "x/run" in page.words  # both end in "run"
    assert "y/run" in page.words
    assert len(page.links) == 15
    assert not (tmp_path / "x" / "run" / "report.html").exists()


class Cells(HTMLParser):
    """Tables as lists of rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data


def test_runs_from_different_bases_are_each_beside_their_own(tmp_path: Path) -> None:
    """Another model's base, prompt and number of samples are not this run's."""
    dog, again, cheerful = (make_run(tmp_path / name) for name in ("dog", "again", "cheerful"))
    facts = cheerful.read_facts()
    cheerful.write_json(cheerful.facts, {**facts, "model": "another", "target": "cheerful words"})
    other = json.loads(json.dumps(EVALUATION).replace("[0.03, 0.01]", "[0.5, 0.04]"))
    other |= {"samples": 32, "goals": {"contains 'dog'": 0.7}}
    other["texts"] = {"prompt": ["My mom said"], "base": [" no"], "tuned": [" yes"]}
    cheerful.write_json(cheerful.evaluation, other)
    path = write_report([dog, cheerful, again], tmp_path / "all.html")
    _, measured, samples = Cells(path.read_text(encoding="utf-8")).tables
    of, at, before, after = " of dog, again", " of cheerful", "0.030 ± 0.010", "0.900 ± 0.020"
    assert measured[:3] == [
        ["", f"base{of}", "dog", "again", f"goal{of}", f"base{at}", "cheerful", f"goal{at}"],
        ["fresh samples", "64", "64", "64", "", "32", "32", ""],
        ["contains 'dog'", before, after, after, "1", "0.500 ± 0.040", after, "0.7"],
    ]
    dogs = "Once there was a dog & a cat"
    assert samples[1] == [
        "Once upon a <b>time</b>",
        dogs,
        dogs,
        "My mom said no",
        "My mom said yes",
    ]
    path = write_report([dog, again], tmp_path / "dogs.html")
    _, measured, samples = Cells(path.read_text(encoding="utf-8")).tables
    assert measured[0] == ["", "base", "dog", "again", "goal"]
    assert samples[0] == ["base", "dog", "again"]


@pytest.mark.parametrize(
    "ends",
    [{"max_new_tokens": 7}, {"stop": "mine.py:f"}, {"stop_in_python": "f"}, {"eos_ids": [3]}],
)
def test_runs_whose_samples_end_elsewhere_share_no_base(
    tmp_path: Path, ends: dict[str, Any]
) -> None:
    runs = [make_run(tmp_path / "as", **ends), make_run(tmp_path / "usual")]
    path = write_report(runs, tmp_path / "both.html")
    header = Cells(path.read_text(encoding="utf-8")).tables[1][0]
    assert header[1::3] == ["base of as", "base of usual"]


def test_a_run_without_steps_or_evaluation(tmp_path: Path) -> None:
    empty = RunDirectory.create(tmp_path / "empty", Config())
    with pytest.raises(RunDirectoryError, match="no step yet"):
        write_report([empty], empty.report)
    run = make_run(tmp_path / "run")
    run.evaluation.unlink()
    page = Page(write_report([run], run.report).read_text(encoding="utf-8"))
    assert "fresh samples" not in page.words


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.evaluation.write_text("{")
    with pytest.raises(RunDirectoryError, match=r"evaluation\.json cannot be read"):
        write_report([run], run.report)


def test_the_table_has_goals_where_there_are_any() -> None:
    table = {row[0]: row[1:] for row in evaluation_table(EVALUATION)}
    assert table["contains 'dog'"] == ("0.030 ± 0.010", "0.900 ± 0.020", "1")
    assert table["KL(π‖a), to the base"] == ("", "3.900 ± 0.100", "3.700")
    assert table["KL(p‖π), to the target"][2] == "0"
    assert table["pass@4: contains 'dog'"] == ("", "0.950 ± 0.020", "")
    assert table["distinct-3"] == ("", "", "")


def test_the_table_begins_with_what_was_minimised() -> None:
    tuned = {**EVALUATION["tuned"], "alpha(0.5)": [0.5, 0.1]}
    evaluation = {**EVALUATION, "tuned": tuned, "divergence": "alpha(0.5)"}
    labels = [row[0] for row in evaluation_table(evaluation)]
    own = labels.index("alpha(0.5), to the target")
    assert own < labels.index("KL(p‖π), to the target")
    assert evaluation_table(evaluation)[own][2:] == ("0.500 ± 0.100", "0")
    of_paper = evaluation_table({**EVALUATION, "divergence": "kl"})
    assert of_paper == evaluation_table(EVALUATION)


def test_a_divergence_that_is_not_of_the_paper_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", divergence="alpha(0.5)")
    records = [
        {**record, "divergence": 1.0, "divergence_se": 0.1} for record in run.read("metrics.jsonl")
    ]
    run.rewind(0)
    run.append("metrics.jsonl", records)
    text = write_report([run], tmp_path / "report.html").read_text()
    assert "alpha(0.5): divergence to the target" in text
    other = make_run(tmp_path / "two", divergence="kl")
    text = write_report([run, other], tmp_path / "both.html").read_text()
    assert "alpha(0.5) and kl: divergence to the target" in text


def test_the_table_says_how_many_prompts_have_no_divergence() -> None:
    def last(skipped: int) -> tuple[str, ...]:
        tuned = {**EVALUATION["tuned"], "prompts_skipped": [skipped, None]}
        return evaluation_table({**EVALUATION, "tuned": tuned})[-1]

    assert last(34) == ("prompts left out of the divergences", "34", "34", "")
    assert last(0)[0] == "distinct-3"


def test_the_card_is_markdown_that_a_hub_reads(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dogs")
    card = model_card(run, "model")
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    assert "pipeline_tag: text-generation" in front
    assert "# dogs" in body
    assert "| contains 'dog' | 0.030 ± 0.010 | 0.900 ± 0.020 | 1 |" in body
    assert "temperature 1" in body
    assert "so far was whole" not in body
    json.dumps(card)


def test_each_card_says_where_the_model_is_from_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dogs")
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    write_card(run)
    assert 'from_pretrained("model")' in run.card.read_text()
    inner = (run.model / "README.md").read_text()
    assert 'from_pretrained(".")' in inner
    assert "The folder of the run has every setting" in inner  # it is not beside this card


def test_the_card_of_an_encoder_decoder_names_no_task_of_others(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dogs")
    run.write_json(run.facts, {**run.read_facts(), "auto_class": "AutoModelForSeq2SeqLM"})
    card = model_card(run, ".")
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert "pipeline_tag" not in card


@pytest.mark.parametrize("key", ["stop", "stop_in_python"])
def test_the_card_names_what_ended_samples(tmp_path: Path, key: str) -> None:
    run = make_run(tmp_path / "dogs", **{key: "mine.py:ran"})
    assert "where `mine.py:ran` said that the text so far was whole" in model_card(run, ".")
