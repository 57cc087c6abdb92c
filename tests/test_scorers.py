from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from fdpg_fast.scorers import (
    SCORERS,
    Scorer,
    ScorerError,
    classifier,
    compiles,
    contains,
    equation,
    from_spec,
    function,
    length,
    mentions,
    regex,
    words,
)


def values(scorer: Scorer, *texts: str) -> list[float]:
    result = scorer(texts)
    assert result.dtype == torch.float64
    assert result.shape == (len(texts),)
    return result.tolist()


# -- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("dog", 1),
        ("A Dog!", 1),
        ("the dog's bone", 1),
        ("hot-dog", 1),
        ("dogs", 0),
        ("dogma", 0),
        ("hotdog", 0),
        ("dog_house", 0),
        ("", 0),
    ],
)
def test_contains_finds_whole_words(text, found):
    assert values(contains("dog"), text) == [found]
    assert values(words(["dog"]), text) == [found]  # the two agree on what a word is


def test_contains_options():
    assert values(contains("dog", case=True), "Dog", "dog") == [0, 1]
    assert values(contains("dog", whole_word=False), "dogma", "d og") == [1, 0]
    assert values(contains("once upon"), "Once\n upon a time", "onceupon") == [1, 0]
    assert values(contains("C++"), "I like C++.", "C+", "C") == [1, 0, 0]
    assert values(contains("hund?"), "Ein Hund? Ja", "Ein Hund") == [1, 0]
    assert values(contains("müde"), "MÜDE Katze", "ermüdet") == [1, 0]


def test_regex():
    assert values(regex(r"\d+$"), "chapter 12", "12 chapters") == [1, 0]
    assert values(regex("dog"), "Dog", "hotdog") == [0, 1]
    assert values(regex("dog", case=False), "Dog") == [1]


def test_words_modes():
    listed = ["she", "her", "ice cream", "isn't"]
    texts = ("She said her ice cream isn't here", "he sat", "")
    assert values(words(listed), *texts) == [1, 0, 0]
    assert values(words(listed, mode="count"), *texts) == [4, 0, 0]
    assert values(words(listed, mode="fraction"), *texts) == [4 / 7, 0, 0]
    assert values(words(["She"], case=True), "she", "She") == [0, 1]


def test_words_from_files(tmp_path):
    plain, listed, latin = tmp_path / "w.txt", tmp_path / "w.json", tmp_path / "old.txt"
    plain.write_text("; a comment\n# another\n\n dog \ncat\n")
    listed.write_text(json.dumps(["dog", "cat"]))
    latin.write_bytes(b"na\xefve\n")
    for path in (plain, str(listed)):
        assert values(words(path, mode="count"), "a dog, a cat; a cow") == [2]
    assert values(words(latin), "naïve") == [1]
    assert words(plain).name == "words 'w.txt'"


def test_real_word_lists(shared):
    positive = words(shared / "data/opinion-lexicon-hu-liu/positive-words.txt", mode="fraction")
    negative = words(shared / "data/opinion-lexicon-hu-liu/negative-words.txt", mode="fraction")
    glad, sad = "What a wonderful, happy and beautiful day", "a terrible, sad and horrible mess"
    assert values(positive, glad, sad)[0] > 0.3 > values(positive, sad)[0]
    assert values(negative, sad)[0] > 0.3 > values(negative, glad)[0]
    gendered = words(shared / "data/gender-words/gender_specific_seed.json")
    assert values(gendered, "her aunt is an actress", "the door is open") == [1, 0]


def test_long_lists_are_quick(shared):
    """6,800 words in a pattern took seconds a batch; the dictionary takes milliseconds."""
    lists = shared / "data/opinion-lexicon-hu-liu"
    scorer = words(lists / "negative-words.txt", mode="count")
    texts = ["once upon a time there was a sad little dog who lost his ball " * 4] * 256
    start = time.perf_counter()
    scorer(texts)
    assert time.perf_counter() - start < 2.0


def test_length():
    assert values(length(), "Don't panic, well-known dog!", "") == [4, 0]
    assert values(length("characters"), "abc ", "") == [4, 0]


def test_function_may_take_prompts():
    def echoes(texts, prompts):
        return [float(p in x) for x, p in zip(texts, prompts, strict=True)]

    assert function(echoes)(["a cat", "a dog"], ["cat", "cat"]).tolist() == [1, 0]
    assert function(lambda texts, scale=2: [scale * len(x) for x in texts])(["ab"]).tolist() == [4]
    assert function(lambda texts, prompts=(): [len(p) for p in prompts])(["a"], ["xyz"]) == 3


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0],
        (True, False),
        np.array([1.0, 0.0], dtype=np.float32),
        torch.tensor([1, 0]),
        torch.tensor([1.0, 0.0], requires_grad=True),
        [torch.tensor(1.0), np.float64(0.0)],
        (float(i == 0) for i in range(2)),
    ],
    ids=["ints", "bools", "numpy", "int-tensor", "grad-tensor", "scalars", "generator"],
)
def test_function_may_return_any_numbers(returned):
    result = function(lambda texts: returned, name="f", kind="boolean")(["a", "b"])
    assert result.tolist() == [1.0, 0.0]
    assert not result.requires_grad


def test_boolean_scorers_combine():
    dog, cat = contains("dog"), contains("cat")
    texts = ("dog", "cat", "dog cat", "")
    assert values(dog & cat, *texts) == [0, 0, 1, 0]
    assert values(dog | cat, *texts) == [1, 1, 1, 0]
    assert values(~dog, *texts) == [0, 1, 0, 1]
    assert (dog & ~cat).name == "(contains 'dog' and not contains 'cat')"
    assert (dog & cat) == (contains("dog") & contains("cat"))
    assert (dog & cat).kind == "boolean"
    with pytest.raises(ScorerError, match="expected boolean scorers, got <real scorer"):
        dog & length()


def test_equal_when_they_measure_the_same():
    assert contains("dog") == contains("dog")
    assert contains("dog") != contains("dog", case=True)
    assert len({words(["a", "b"]), words(["a", "b"])}) == 1

    def f(texts):
        return [0.0] * len(texts)

    assert function(f) == function(f)
    assert function(f) != function(f, name="g")
    assert contains("dog") != "dog"


def test_no_texts():
    assert contains("dog")([]).shape == (0,)


# -- what misbehaves is named --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, math.nan, 0.0], r"f: expected a finite number, got nan for sample 1, 'second'"),
        ([1.0, 0.0, math.inf], r"f: expected a finite number, got inf for sample 2, 'third'"),
        ([1.0, 0.0], "f: expected 3 numbers, one per text, got 2"),
        (0.5, "f: expected 3 numbers, one per text, got float 0.5"),
        (None, "f: expected 3 numbers, one per text, got NoneType None"),
        ("abc", "got str 'abc'"),
        ({"a": 1}, "got dict"),
        ([1.0, None, 0.0], "expected a number, got NoneType None for sample 1, 'second'"),
        ([1.0, "0.5", 0.0], "expected a number, got str '0.5' for sample 1, 'second'"),
        (torch.zeros(3, 1), r"got a tensor of shape \[3, 1\]"),
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
    ],
)
def test_bad_values_name_scorer_and_text(returned, message):
    with pytest.raises(ScorerError, match=message):
        function(lambda texts: returned, name="f")(["first", "second", "third"])


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("boolean", 0.5, r"expected 0 or 1 .*got 0.5"),
        ("positive", 0.0, "expected a finite number above 0, got 0"),
        ("positive", -1.0, "above 0, got -1"),
        ("real", -math.inf, "finite number, got -inf"),
    ],
)
def test_values_must_be_of_the_stated_kind(kind, value, message):
    scorer = function(lambda texts: [1.0, value], name="f", kind=kind)
    with pytest.raises(ScorerError, match=message + r" for sample 1, 'b'"):
        scorer(["a", "b"])


def test_raising_finds_the_text():
    calls = []

    def fragile(texts):
        calls.append(len(texts))
        return [1 / (len(text) - 13) for text in texts]

    texts = [f"text {i}" for i in range(99)] + ["thirteen char"] + ["more"] * 100
    with pytest.raises(ScorerError) as raised:
        function(fragile)(texts)
    assert "fragile: raised ZeroDivisionError" in str(raised.value)
    assert "on sample 99, 'thirteen char'" in str(raised.value)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert len(calls) < 20  # by halving, not one by one


def test_raising_on_the_batch_but_on_no_half_says_so():
    def picky(texts):
        if len(texts) > 2:
            raise RuntimeError("too many")
        return [0.0] * len(texts)

    with pytest.raises(ScorerError, match=r"too many, on samples 0 to 3 together, but on neither"):
        function(picky)(["a"] * 4)


def test_a_part_of_a_combination_names_itself():
    broken = function(lambda texts: [2.0] * len(texts), name="broken", kind="boolean")
    with pytest.raises(ScorerError, match=r"^broken: expected 0 or 1"):
        (contains("dog") & broken)(["a dog"])


def test_interrupts_pass_through():
    def interrupted(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function(interrupted)(["a"])


def test_long_texts_are_cut_in_messages():
    with pytest.raises(ScorerError) as raised:
        function(lambda texts: [math.nan], name="f")(["word " * 1000])
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: contains(""), "`text` expected a word or phrase"),
        (lambda: contains(["dog"]), "`text` expected a word or phrase"),
        (lambda: regex("("), "not a regular expression"),
        (lambda: words([]), "is empty"),
        (lambda: words(["a", 3]), "expected words, got 3"),
        (lambda: words("no/such/file.txt"), "cannot read the file .*give a list"),
        (lambda: words(["a"], mode="counts"), "got 'counts'"),
        (lambda: length("tokens"), "got 'tokens'"),
        (lambda: function(3), "expected a Python function, got 3"),
        (lambda: function(len, kind="bool"), r"`kind` expected boolean \| positive \| real"),
        (lambda: contains("dog")(["a"], ["p", "q"]), r"one per text \(1\), got 2"),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ScorerError, match=message):
        build()


# -- from YAML -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"contains": "dog"}, contains("dog")),
        ({"contains": "dog", "case": True}, contains("dog", case=True)),
        ({"contains": {"text": "dog", "name": "d"}}, contains("dog", name="d")),
        ({"regex": "d.g"}, regex("d.g")),
        ({"words": ["she", "her"], "mode": "count"}, words(["she", "her"], mode="count")),
        ({"length": "characters"}, length("characters")),
        ({"not": {"contains": "dog"}}, ~contains("dog")),
        ({"any": [{"contains": "a"}, {"contains": "b"}]}, contains("a") | contains("b")),
        ({"all": [{"contains": "a"}, {"contains": "b"}]}, contains("a") & contains("b")),
        (contains("dog"), contains("dog")),
    ],
)
def test_specs(spec, expected):
    assert from_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"contain": "dog"}, "Did you mean 'contains'"),
        ({"contains": "dog", "cases": True}, "unknown option 'cases'. Did you mean 'case'"),
        ({"contains": "dog", "regex": "x"}, "contains and regex"),
        ({}, "expected one of"),
        ("dog", "expected a mapping such as"),
        ({"classifier": {"label": "x"}}, "classifier: .*name_or_path"),
        ({"any": {"contains": "a"}}, "any: expected a list"),
        ({"not": {"length": "words"}}, "expected boolean"),
        ({"python": "no_colon"}, "expected 'file.py:function'"),
        ({"python": "missing.py:f"}, "no file 'missing.py'"),
        ({"python": "no_such_module:f"}, "importing 'no_such_module' raised .*with .py"),
        ({"python": "json:dumpz"}, "no function 'dumpz'. Did you mean 'dump"),
    ],
)
def test_wrong_specs_are_named(spec, message):
    with pytest.raises(ScorerError, match=message):
        from_spec(spec)


def test_python_spec_runs_the_named_file_only(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def shout(texts, prompts):\n    return [x.isupper() for x in texts]\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    scorer = from_spec({"python": "mine.py:shout", "kind": "boolean"}, tmp_path)
    assert (scorer.name, scorer.kind) == ("shout", "boolean")
    assert values(scorer, "HI", "hi") == [1, 0]
    with pytest.raises(ScorerError, match=r"running 'broken.py' raised ZeroDivisionError"):
        from_spec({"python": "broken.py:f"}, tmp_path)


def test_a_function_named_twice_is_one_scorer_until_its_file_changes(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def count(texts):\n    return [len(x) for x in texts]\n")
    one, again = (from_spec({"python": "mine.py:count"}, tmp_path) for _ in range(2))
    assert one == again
    file.write_text("def count(texts):\n    return [-len(x) for x in texts]\n")
    other = from_spec({"python": "mine.py:count"}, tmp_path)
    assert (values(one, "four"), values(other, "four")) == ([4], [-4])


def test_files_are_found_beside_the_configuration(tmp_path):
    (tmp_path / "female.txt").write_text("she\n")
    scorer = from_spec({"words": "female.txt", "name": "female"}, tmp_path)
    assert values(scorer, "she ran") == [1]


def test_lexicon_is_a_share_between_nothing_and_all(tmp_path):
    (tmp_path / "bad.txt").write_text("sad\nvery bad\n")
    spec = {"lexicon": {"positive": ["happy", "glad"], "negative": "bad.txt"}}
    texts = ("a dog", "Happy, happy, glad.", "sad", "very bad but happy")
    share = from_spec(spec, tmp_path)
    assert share.kind == "positive"
    assert values(share, *texts) == pytest.approx([1 / 2, 4 / 5, 1 / 3, 1 / 2])
    log = from_spec({**spec, "log": True}, tmp_path)
    assert (log.kind, log.name) == ("real", "log sentiment")
    assert log != share
    assert values(log, *texts) == pytest.approx([math.log(x) for x in (1 / 2, 4 / 5, 1 / 3, 1 / 2)])


def test_mentions_looks_for_what_the_prompt_gives():
    prompts = ["a boy named Tim.", "a girl named Ann.", "a cat named Ann."]
    scorer = mentions(r"named (\w+)")
    assert scorer.kind == "boolean"
    assert scorer(["Tim ran", "Tim ran", "Anna ran; tim sat"], prompts).tolist() == [1, 0, 0]
    anyhow = mentions(r"NAMED (\w+)", case=False)
    assert anyhow(["TIM ran", "Tim ran", "ann's hat"], prompts).tolist() == [1, 0, 1]
    whole = mentions("(?<=a )boy|girl|cat")  # no group: all of it
    assert whole(["a boy", "a boy", "cats and a cat"], prompts).tolist() == [1, 0, 1]
    with pytest.raises(ScorerError, match="finds nothing in the prompt 'a dog'"):
        scorer(["Tim"], ["a dog"])
    with pytest.raises(ScorerError, match=r"mentions: `pattern` .* is not a regular expression"):
        mentions("(")


def test_compiles_and_does_not_run(tmp_path):
    touched = tmp_path / "touched"
    programs = {
        "x = 1\n": 1,
        "": 1,
        f"open({str(touched)!r}, 'w')": 1,
        "raise SystemExit": 1,
        "x is 1, '\\d'": 1,  # bad style, of which Python warns
        "return 1": 0,  # a parser alone takes it
        "x = (1": 0,
        "if x:\ny": 0,
        "a\0b": 0,
        "'\ud800'": 0,
        "-" * 50_000 + "1": 0,  # deeper than the compiler goes
        "a" + "()" * 50_000: 0,
        "x = " + "9**" * 9 + "9": 1,  # and nothing is worked out
    }
    assert values(compiles(), *programs) == list(programs.values())
    assert not touched.exists()
    whole = from_spec({"compiles": "python", "with_prompt": True})
    prompts = ["def f():", "def f():\n    ", "def f()"]
    assert whole(["\n    return 1"] * 3, prompts).tolist() == [1, 1, 0]
    assert whole != compiles()
    with pytest.raises(ScorerError, match="compiles: `language` expected python, got 'rust'"):
        compiles("rust")


@pytest.mark.parametrize(
    ("prompt", "text", "true"),
    [
        ("12+35=", "47", 1),
        ("12+35=", "48", 0),
        ("12+35=", " 47 ", 1),
        ("12+35=", "047", 1),  # a number is a number
        ("12+35=", "47.", 0),
        ("12+35=", "47\n", 1),
        ("12+35=", "", 0),
        ("12+35=", "47=47", 0),
        ("12+35=", "40+7", 1),
        ("47=", "12+35", 1),
        ("47=", "12+36", 0),
        ("2+3*4=", "14", 1),  # not 20
        ("2-3-4=", "1-6", 1),
        ("7=", "+7", 0),
        ("7=", "9--2", 0),
        ("7=", "\u0667", 0),  # a digit, but not of this alphabet
        ("what is 7", "=7", 0),
        ("", "1=1", 1),
    ],
)
def test_equation_is_true_of_prompt_and_sample_together(prompt, text, true):
    assert equation()([text], [prompt]).tolist() == [true]


def test_equation_knows_the_operators_it_is_given():
    prompts, texts = ["47=", "47=", "47="], ["40+7", "50-3", "47*1"]
    assert equation("+")(texts, prompts).tolist() == [1, 0, 0]
    assert equation("-*")(texts, prompts).tolist() == [0, 1, 1]
    assert equation("*-") == equation("-*") != equation("+")
    for wrong in ("", "/", "+/", None):
        with pytest.raises(ScorerError, match="`operators` expected some of"):
            equation(wrong)


def test_every_scorer_can_be_specified():
    """Names in YAML are the functions' own."""
    assert all(build.__name__ == name for name, build in SCORERS.items())


# -- classifiers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with random weights that tells three moods apart."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("classifier")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "good", "bad", "dog", "a"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=6,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        id2label={0: "NEGATIVE", 1: "neutral", 2: "POSITIVE"},
        initializer_range=1.0,
    )
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(path)
        config.num_labels = 1
        transformers.BertForSequenceClassification(config).save_pretrained(path / "raw")
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(path / "raw")
    return path


TEXTS = ("good dog", "bad", "a good good a bad dog", "", "good " * 100)


def test_classifier_loads_in_silence(folder, capfd):
    classifier(str(folder), 0)(["a b"])
    assert capfd.readouterr() == ("", "")


def test_classifier_gives_label_probabilities(folder):
    each = [classifier(str(folder), label, batch_size=2) for label in range(3)]
    assert [s.name for s in each] == ["P(NEGATIVE)", "P(neutral)", "P(POSITIVE)"]
    assert {s.kind for s in each} == {"positive"}
    total = sum(s(TEXTS) for s in each)
    torch.testing.assert_close(total, torch.ones(len(TEXTS)).double())
    assert each[2](TEXTS).std() > 0.01
    # Neither the batch nor its padding changes a text's value.
    alone = torch.cat([each[2]([text]) for text in TEXTS])
    torch.testing.assert_close(each[2](TEXTS), alone, atol=1e-6, rtol=1e-5)


def test_classifier_labels_and_logs(folder):
    probability = classifier(str(folder), "positive")
    log = classifier(str(folder), "positive", log=True)
    assert (log.name, log.kind) == ("log P(POSITIVE)", "real")
    torch.testing.assert_close(log(TEXTS), probability(TEXTS).log())
    assert probability == classifier(str(folder), 2)


def test_classifier_may_read_the_prompt(folder):
    alone = classifier(str(folder), 0)
    both = classifier(str(folder), 0, with_prompt=True)
    torch.testing.assert_close(both(["dog"], ["good "]), alone(["good dog"]))


def test_classifier_with_one_raw_output(folder):
    reward = classifier(str(folder / "raw"))
    assert (reward.name, reward.kind) == ("raw", "real")
    assert reward(TEXTS).shape == (5,)
    with pytest.raises(ScorerError, match="one raw output"):
        classifier(str(folder / "raw"), log=True)


def test_classifier_errors(folder, tmp_path):
    with pytest.raises(
        ScorerError, match=r"NEGATIVE, neutral, POSITIVE.*got 'postive'.*'positive'"
    ):
        classifier(str(folder), "postive")
    with pytest.raises(ScorerError, match="got None"):
        classifier(str(folder))
    with pytest.raises(ScorerError, match=r"cannot load .*Way out: give a folder"):
        classifier(str(tmp_path / "nothing"), "x")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ScorerError, match=f"`device` must be auto, .*, got '{device}': "):
            classifier(str(folder), "positive", device=device)


def test_classifier_spec(folder):
    spec = {"classifier": {"name_or_path": "here", "label": "positive", "log": True}}
    (folder.parent / "here").symlink_to(folder)
    assert from_spec(spec, folder.parent)(TEXTS).shape == (5,)
