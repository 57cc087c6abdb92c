"""Prompts come from texts and files, in an order that is a function of the step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import language_model
from tiny import write_tiny_model

from fdpg_fast.models import LanguageModel, ModelError
from fdpg_fast.prompts import PromptError, Prompts, as_setting

pytestmark = pytest.mark.usefixtures("one_thread")


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel.load(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(("count", "per_step"), [(1, 1), (7, 1), (7, 3), (6, 3), (5, 5)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_visits_every_prompt(count: int, per_step: int, shuffle: bool) -> None:
    texts = [chr(65 + i) for i in range(count)]
    prompts = Prompts(texts, encode, per_step=per_step, shuffle=shuffle, seed=3)
    steps = -(-count // per_step)
    for epoch in range(3):
        seen: set[str] = set()
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = prompts.batch(step)
            assert len(set(batch.texts)) == len(batch) == per_step
            assert batch.texts == tuple(texts[i] for i in batch.ids.tolist())
            assert batch.tokens == tuple((ord(text),) for text in batch.texts)
            seen.update(batch.texts)
        assert seen == set(texts)


def test_the_order_is_a_function_of_seed_and_step() -> None:
    texts = [chr(65 + i) for i in range(20)]
    prompts = Prompts(texts, encode, per_step=5, seed=1)
    later = Prompts(texts, encode, per_step=5, seed=1)
    # Asked in another order, and from the middle on, as a resumed run does.
    assert [later.batch(step).texts for step in (9, 0, 4)] == [
        prompts.batch(step).texts for step in (9, 0, 4)
    ]
    other = Prompts(texts, encode, per_step=5, seed=2)
    assert [other.batch(s).texts for s in range(4)] != [prompts.batch(s).texts for s in range(4)]
    assert prompts.batch(0).texts != prompts.batch(4).texts, "another epoch, another order"
    assert prompts.all().texts == tuple(texts)
    assert len(prompts) == 20


@pytest.mark.parametrize("source", [None, ""])
def test_no_prompt_is_the_beginning_of_a_text(source: str | None, model: LanguageModel) -> None:
    prompts = Prompts.load(source, model)
    assert prompts.texts == ("",)
    assert prompts.tokens == (model.bos_prompt,) == ((0,),)


def test_sources(model: LanguageModel, tmp_path: Path) -> None:
    assert Prompts.load("once there was", model).tokens == ((1, 2, 3),)
    assert Prompts.load(["a dog", "she"], model, 2).tokens == ((4, 5), (7,))
    lines = tmp_path / "prompts.txt"
    lines.write_text("a dog\nonce there was\n", encoding="utf-8")
    assert Prompts.load(lines, model).texts == ("a dog", "once there was")
    assert Prompts.load(str(lines), model).texts == ("a dog", "once there was")
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "a dog", "other": 1}\n{"prompt": "she"}\n', encoding="utf-8")
    assert Prompts.load(records, model).texts == ("a dog", "she")


def test_a_line_ends_at_a_newline_alone(model: LanguageModel, tmp_path: Path) -> None:
    """JSON need not escape what other ends of a line Unicode has."""
    texts = ["a\u2028dog", "she\x85", "once\x0cthere", "was\u2029a", "\x1cran"]
    for kind, lines in (
        ("txt", texts),
        ("jsonl", [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]),
    ):
        for end in ("\n", "\r\n"):
            for last in (end, ""):
                path = tmp_path / f"prompts.{kind}"
                path.write_bytes((end.join(lines) + last).encode())
                expected = lines if kind == "txt" else [json.loads(x)["prompt"] for x in lines]
                assert list(Prompts.load(path, model).texts) == expected


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "a dog\n"), ("a.jsonl", '{"prompt": "a dog"}')]
)
def test_a_byte_order_mark_is_no_part_of_a_prompt(
    model: LanguageModel, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert Prompts.load(tmp_path / name, model).texts == ("a dog",)


def test_a_file_of_another_kind_is_not_taken_for_a_text(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PromptError, match=r"p\.csv: expected a text, or one of .*list: \['p\.csv'\]"
    ):
        Prompts.load("p.csv", model)  # there is no such file
    for text in ("a dog.", "a.", "2.5=", "see p.csv", "a . dog"):
        assert Prompts.load(text, model).texts == (text,)
    (tmp_path / "p.csv").write_text("prompt\na dog\n")
    for source in ("p.csv", Path("p.csv"), str(tmp_path / "p.csv")):
        with pytest.raises(
            PromptError, match=r"p\.csv: expected a text, or one of \.txt, \.jsonl\. .*list: \["
        ):
            Prompts.load(source, model)
    assert Prompts.load(["p.csv"], model).texts == ("p.csv",)


def test_bad_sources_are_named(model: LanguageModel, tmp_path: Path) -> None:
    def load(name: str, text: str) -> None:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        Prompts.load(path, model)

    with pytest.raises(PromptError, match=r"a\.txt, line 2 is empty. Remove the line"):
        load("a.txt", "a dog\n\nshe\n")
    with pytest.raises(PromptError, match=r"b\.txt is empty"):
        load("b.txt", "")
    with pytest.raises(PromptError, match=r"c\.jsonl, line 1 is not JSON"):
        load("c.jsonl", "a dog\n")
    with pytest.raises(PromptError, match=r'd\.jsonl, line 2: expected {"prompt": "some text"}'):
        load("d.jsonl", '{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(PromptError, match=r"cannot read .*nowhere\.txt"):
        Prompts.load(tmp_path / "nowhere.txt", model)
    with pytest.raises(PromptError, match=r"expected a text, or one of \.txt, \.jsonl"):
        Prompts.load(tmp_path / "prompts.csv", model)
    with pytest.raises(PromptError, match="prompt 1 of the list must be a text, got ''"):
        Prompts.load(["a dog", ""], model)
    with pytest.raises(PromptError, match="expected at least one"):
        Prompts.load([], model)
    for read in (lambda source: Prompts.load(source, model), as_setting):
        with pytest.raises(PromptError, match="expected a text, a path or a list of texts, got 3"):
            read(3)


def test_prompts_must_fit_the_model(model: LanguageModel) -> None:
    long = "a dog " * 15
    assert len(Prompts.load(long, model, max_new_tokens=2)) == 1
    with pytest.raises(
        PromptError,
        match=r"prompt 1, 'a dog.*of 30 tokens and 3 new ones do not fit the 32 tokens",
    ):
        Prompts.load(["she", long], model, max_new_tokens=3)


def test_per_step_is_at_most_the_number_of_prompts() -> None:
    for per_step in (0, 3):
        with pytest.raises(PromptError, match=rf"prompts_per_step in 1\.\.2 .*got {per_step}"):
            Prompts(["a", "b"], encode, per_step=per_step)
    with pytest.raises(PromptError, match="prompt 1, '', has no tokens"):
        Prompts(["a", ""], encode)
    with pytest.raises(ValueError, match="`step` must be at least 0"):
        Prompts(["a"], encode).batch(-1)


def test_a_model_without_tokenizer_takes_no_text() -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        Prompts.load("a dog", language_model("gpt2"))
