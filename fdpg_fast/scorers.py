"""Scorers: what is measured of a text, b(x), phi(x) or r(x) of the papers, one number each.

A scorer sees the *sample*: the text the model wrote, without its prompt and without special
tokens. (``mentions``, ``equation``, ``compiles``, and a Python function of two arguments, are also
given the prompts.)

Three kinds of value, because a target uses each in another way:

    boolean   0 or 1        a condition; ``base.constrain({b: 1.0})``, ``base * b``
    positive  > 0           a weight that never forbids a text; ``base * w``
    real      any number    a feature or a reward; ``base.reward(r, beta=0.1)``

Every call is checked: a scorer that raises, or returns NaN, an infinity, the wrong number or the
wrong kind of values is named in a ``ScorerError`` together with the text that did it.

Words are runs of letters, digits and underscores, so ``dog`` is found in "Dog!" and "the dog's
bone" but not in "dogs" or "dogma". Upper and lower case are the same unless asked.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "SCORERS",
    "Scorer",
    "ScorerError",
    "classifier",
    "compiles",
    "contains",
    "describe_scorers",
    "equation",
    "from_spec",
    "function",
    "length",
    "lexicon",
    "load_function",
    "mentions",
    "nearest",
    "regex",
    "words",
]

Kind = Literal["boolean", "positive", "real"]
KINDS: tuple[Kind, ...] = ("boolean", "positive", "real")


class ScorerError(ValueError):
    """A scorer that cannot be built, or that misbehaved on a text."""


class Scorer:
    """A named measurement of texts. Made by the functions below; equal when it measures the same.

    Args:
        measure: ``(texts, prompts) -> B values``: a tensor ``(B,)`` or a sequence of numbers.
        name: what tables, plots and errors call it.
        kind: ``boolean``, ``positive`` or ``real``: what its values are, and are checked to be.
        key: what makes two scorers the same measurement; by default each is its own.

    Boolean scorers combine: ``a & b``, ``a | b``, ``~a``.
    """

    def __init__(
        self,
        measure: Callable[[Sequence[str], Sequence[str]], Any],
        *,
        name: str,
        kind: Kind,
        key: Hashable = None,
    ) -> None:
        if kind not in KINDS:
            raise ScorerError(f"{name}: `kind` expected {' | '.join(KINDS)}, got {kind!r}")
        self.name = name
        self.kind: Kind = kind
        self._measure = measure
        self._key = (name, kind, id(self) if key is None else key)

    def __call__(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """The value of each text.

        Args:
            texts: B samples, without their prompts.
            prompts: B prompts; empty ones by default.

        Returns:
            ``(B,)`` fp64 on the CPU.

        Raises:
            ScorerError: the scorer raised, or a value is missing, not finite or of the wrong kind.
        """
        texts = list(texts)
        prompts = [""] * len(texts) if prompts is None else list(prompts)
        if len(prompts) != len(texts):
            raise ScorerError(
                f"{self.name}: `prompts` expected one per text ({len(texts)}), got {len(prompts)}"
            )
        if not texts:
            return torch.zeros(0, dtype=torch.float64)
        try:
            returned = self._measure(texts, prompts)
        except Exception as error:
            raise self._blame(error, texts, prompts) from error
        values = self._to_tensor(returned, texts)
        self._check_values(values, texts)
        return values

    def __and__(self, other: Scorer) -> Scorer:
        return _combine("and", self, other, torch.minimum)

    def __or__(self, other: Scorer) -> Scorer:
        return _combine("or", self, other, torch.maximum)

    def __invert__(self) -> Scorer:
        _require_boolean("~", self)
        return Scorer(
            lambda texts, prompts: 1.0 - self(texts, prompts),
            name=f"not {self.name}",
            kind="boolean",
            key=("not", self._key),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scorer) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<{self.kind} scorer: {self.name}>"

    def _blame(self, error: Exception, texts: Sequence[str], prompts: Sequence[str]) -> ScorerError:
        """Which text did it: halve the batch while one half alone still raises."""
        if isinstance(error, ScorerError):  # of a part of a combination: it has named itself
            return error
        low, high = 0, len(texts)
        while high - low > 1:
            middle = (low + high) // 2
            for half in ((low, middle), (middle, high)):
                try:
                    self._measure(texts[slice(*half)], prompts[slice(*half)])
                except Exception as smaller:
                    error, (low, high) = smaller, half
                    break
            else:  # neither half raises alone: the batch as a whole did it
                break
        where = (
            f"on sample {low}, {shorten(texts[low])}"
            if high - low == 1
            else f"on samples {low} to {high - 1} together, but on neither half of them"
        )
        return ScorerError(f"{self.name}: raised {type(error).__name__}: {error}, {where}")

    def _to_tensor(self, returned: Any, texts: Sequence[str]) -> Tensor:
        expected = f"{self.name}: expected {len(texts)} numbers, one per text"
        if isinstance(returned, Tensor):
            if returned.shape != (len(texts),):
                raise ScorerError(f"{expected}, got a tensor of shape {list(returned.shape)}")
            if returned.is_complex():
                raise ScorerError(f"{expected}, got a tensor of {returned.dtype}")
            return returned.detach().to("cpu", torch.float64)
        if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
            raise ScorerError(f"{expected}, got {type(returned).__name__} {shorten(returned)}")
        values = list(returned)
        if len(values) != len(texts):
            raise ScorerError(f"{expected}, got {len(values)}")
        numbers = []
        for index, value in enumerate(values):
            try:
                if isinstance(value, str | bytes):  # float("0.5") would pass
                    raise TypeError
                numbers.append(float(value))
            except (TypeError, ValueError):
                raise ScorerError(
                    f"{self.name}: expected a number, got {type(value).__name__} "
                    f"{shorten(value)} for sample {index}, {shorten(texts[index])}"
                ) from None
        return torch.tensor(numbers, dtype=torch.float64)

    def _check_values(self, values: Tensor, texts: Sequence[str]) -> None:
        fine, expected = {
            "boolean": ((values == 0) | (values == 1), "0 or 1 (it is a boolean scorer)"),
            "positive": (values.isfinite() & (values > 0), "a finite number above 0"),
            "real": (values.isfinite(), "a finite number"),
        }[self.kind]
        if not fine.all():
            index = int((~fine).nonzero()[0])
            raise ScorerError(
                f"{self.name}: expected {expected}, got {values[index].item():g} "
                f"for sample {index}, {shorten(texts[index])}"
            )


# ------------------------------------------------------------------------------------------------
# What can be measured


def contains(
    text: str, *, case: bool = False, whole_word: bool = True, name: str | None = None
) -> Scorer:
    """1 where the sample contains ``text``, a word or a phrase.

    Args:
        text: what to look for; a space in it stands for any white space.
        case: whether upper and lower case differ.
        whole_word: whether it must not continue a word at either end (``dog`` is not in "dogma").
        name: by default ``contains 'dog'``.
    """
    if not isinstance(text, str) or not text.strip():
        raise ScorerError(f"contains: `text` expected a word or phrase, got {text!r}")
    pattern = _phrase(text) if whole_word else r"\s+".join(map(re.escape, text.split()))
    found = re.compile(pattern, 0 if case else re.IGNORECASE)
    options = (", case" if case else "") + ("" if whole_word else ", part of a word")
    return Scorer(
        lambda texts, _: [found.search(x) is not None for x in texts],
        name=name or f"contains {text!r}{options}",
        kind="boolean",
        key=("contains", text, case, whole_word),
    )


def regex(pattern: str, *, case: bool = True, name: str | None = None) -> Scorer:
    """1 where the sample matches a regular expression (of Python's ``re``) anywhere.

    Args:
        pattern: the expression; ``^`` and ``$`` are the sample's ends.
        case: whether upper and lower case differ (they do, unlike in ``contains``).
        name: by default ``regex 'pattern'``.
    """
    found = _expression("regex", pattern, case)
    return Scorer(
        lambda texts, _: [found.search(x) is not None for x in texts],
        name=name or f"regex {pattern!r}" + ("" if case else ", any case"),
        kind="boolean",
        key=("regex", pattern, case),
    )


def words(
    source: Sequence[str] | str | Path,
    *,
    mode: Literal["presence", "count", "fraction"] = "presence",
    case: bool = False,
    name: str | None = None,
) -> Scorer:
    """How much the sample uses the words (or phrases) of a list.

    Args:
        source: the words, or a file of them: ``.json`` (a list of strings) or text, one a line,
            where empty lines and lines that begin with ``#`` or ``;`` do not count. Files are read
            as UTF-8, or as Latin-1 where they are not UTF-8 (some old lexicons).
        mode: ``presence``: 1 where any of them occurs (boolean); ``count``: how often they occur,
            all together (real); ``fraction``: count / number of words of the sample (real).
        case: whether upper and lower case differ.
        name: by default made of the file's name or the first words.
    """
    if mode not in ("presence", "count", "fraction"):
        raise ScorerError(f"words: `mode` expected presence | count | fraction, got {mode!r}")
    if isinstance(source, str | Path):
        listed, label = _read_words(Path(source)), repr(Path(source).name)
    else:
        listed = list(source)
        label = "[" + ", ".join(map(str, listed[:3])) + (", …]" if len(listed) > 3 else "]")
    for word in listed:
        if not isinstance(word, str) or not word.strip():
            raise ScorerError(f"words: expected words, got {word!r} in the list {label}")
    if not listed:
        raise ScorerError(f"words: the list {label} is empty")

    # A dictionary for the plain words, which may be thousands, and a pattern for the few others
    # (phrases, hyphens, apostrophes): a pattern of thousands of alternatives takes seconds a batch.
    def fold(text: str) -> str:
        return text if case else text.lower()

    plain = {fold(w.strip()) for w in listed if re.fullmatch(r"\w+", w.strip())}
    others = sorted({fold(w.strip()) for w in listed} - plain, key=lambda w: (-len(w), w))
    other = re.compile("|".join(map(_phrase, others))) if others else None

    def count(text: str) -> int:
        text = fold(text)
        hits = sum(word in plain for word in re.findall(r"\w+", text))
        return hits + (len(other.findall(text)) if other else 0)

    def measure(texts: Sequence[str], _: Sequence[str]) -> list[float]:
        counts = [count(x) for x in texts]
        if mode == "presence":
            return [float(n > 0) for n in counts]
        if mode == "count":
            return [float(n) for n in counts]
        return [n / max(1, _count_words(x)) for n, x in zip(counts, texts, strict=True)]

    return Scorer(
        measure,
        name=name or f"words {label}" + ("" if mode == "presence" else f" ({mode})"),
        kind="boolean" if mode == "presence" else "real",
        key=("words", frozenset(plain), tuple(others), mode, case),
    )


def lexicon(
    positive: Sequence[str] | str | Path,
    negative: Sequence[str] | str | Path,
    *,
    log: bool = False,
    name: str | None = None,
) -> Scorer:
    """How positive the sample's words of opinion are: a sentiment without a model (positive).

    The share (1 + positive words) / (2 + words of opinion): 1/2 for a text without any, and nearer
    to 0 or 1 the more of them agree. It does not know what "not" does.

    Args:
        positive, negative: words or files of them, as for :func:`words`.
        log: its logarithm instead (real): r = log phi of f-DPG's scalar preferences.
        name: by default ``sentiment``.
    """
    good, bad = (words(source, mode="count") for source in (positive, negative))

    def measure(texts: Sequence[str], _: Sequence[str]) -> Tensor:
        likes, dislikes = good(texts), bad(texts)
        share = (1 + likes) / (2 + likes + dislikes)
        return share.log() if log else share

    return Scorer(
        measure,
        name=name or ("log sentiment" if log else "sentiment"),
        kind="real" if log else "positive",
        key=("lexicon", good._key, bad._key, log),
    )


def mentions(pattern: str, *, case: bool = True, name: str | None = None) -> Scorer:
    """1 where the sample contains what a regular expression finds in its prompt (boolean).

    Whether a text keeps to what it was given: to the character of a story, say, by
    ``named (\\w+)``.

    Args:
        pattern: what it finds first, or its group if it has one, is looked for as a whole word or
            phrase.
        case: whether upper and lower case differ, in both.
        name: by default ``mentions 'pattern'``.
    """
    given = _expression("mentions", pattern, case)

    def wanted(prompt: str) -> re.Pattern[str]:
        found = given.search(prompt)
        phrase = found and found[min(1, given.groups)]
        if not phrase or not phrase.strip():
            raise ScorerError(
                f"mentions: {pattern!r} finds nothing in the prompt {shorten(prompt)}. Way out: a "
                "pattern that fits every prompt"
            )
        return re.compile(_phrase(phrase), given.flags)

    def measure(texts: Sequence[str], prompts: Sequence[str]) -> list[bool]:
        wants = {prompt: wanted(prompt) for prompt in set(prompts)}
        return [wants[p].search(x) is not None for x, p in zip(texts, prompts, strict=True)]

    return Scorer(
        measure,
        name=name or f"mentions {pattern!r}" + ("" if case else ", any case"),
        kind="boolean",
        key=("mentions", pattern, case),
    )


def compiles(
    language: Literal["python"] = "python", *, with_prompt: bool = False, name: str | None = None
) -> Scorer:
    """1 where the sample is a program that compiles (boolean). It is never run.

    Args:
        language: ``python``, of the version that runs this.
        with_prompt: whether the program is the prompt and the sample, not the sample alone.
        name: by default ``compiles as python``.
    """
    if language != "python":
        raise ScorerError(f"compiles: `language` expected python, got {language!r}")

    def measure(texts: Sequence[str], prompts: Sequence[str]) -> list[bool]:
        pairs = zip(prompts, texts, strict=True)
        return [_compiles(prompt + x if with_prompt else x) for prompt, x in pairs]

    return Scorer(
        measure,
        name=name or f"compiles as {language}",
        kind="boolean",
        key=("compiles", language, with_prompt),
    )


def equation(operators: str = "+-*", *, name: str | None = None) -> Scorer:
    """1 where prompt and sample together are a true equation (boolean): ``12+35=`` and ``47``.

    It verifies what was computed, whatever was asked: after ``47=``, ``12+35`` is as right as
    ``40+7``. Each side is whole numbers joined by operators, with blanks anywhere between them;
    anything more, or less, is wrong.

    Args:
        operators: which of ``+``, ``-`` and ``*`` may occur; ``*`` binds closer.
        name: by default ``equation``.
    """
    if not isinstance(operators, str) or not operators or set(operators) - set("+-*"):
        raise ScorerError(f"equation: `operators` expected some of +, - and *, got {operators!r}")
    side = rf"\s*\d+\s*(?:[{re.escape(operators)}]\s*\d+\s*)*"
    form = re.compile(rf"({side})=({side})", re.ASCII)

    def holds(text: str) -> bool:
        sides = form.fullmatch(text)
        return sides is not None and _sum(sides[1]) == _sum(sides[2])

    return Scorer(
        lambda texts, prompts: [holds(p + x) for p, x in zip(prompts, texts, strict=True)],
        name=name or "equation",
        kind="boolean",
        key=("equation", frozenset(operators)),
    )


def length(unit: Literal["words", "characters"] = "words", *, name: str | None = None) -> Scorer:
    """How long the sample is, in words ("don't" is one) or in characters (real)."""
    if unit not in ("words", "characters"):
        raise ScorerError(f"length: `unit` expected words | characters, got {unit!r}")
    measure = _count_words if unit == "words" else len
    return Scorer(
        lambda texts, _: [float(measure(x)) for x in texts],
        name=name or f"length in {unit}",
        kind="real",
        key=("length", unit),
    )


def function(fn: Callable[..., Any], *, name: str | None = None, kind: Kind = "real") -> Scorer:
    """Any Python function over a batch: ``fn(texts)`` or ``fn(texts, prompts)`` -> B numbers.

    Args:
        fn: given B texts (and B prompts, if it takes two arguments), returns a tensor ``(B,)`` or
            a sequence of B numbers. It should be a function of the text alone: lambdas and Z are
            estimated over many batches.
        name: by default the function's own name.
        kind: what its values are: ``boolean``, ``positive`` or ``real``.
    """
    if not callable(fn):
        raise ScorerError(f"function: `fn` expected a Python function, got {shorten(fn)}")
    both = _takes_prompts(fn)
    return Scorer(
        (lambda texts, prompts: fn(texts, prompts)) if both else (lambda texts, _: fn(texts)),
        name=name or str(getattr(fn, "__name__", type(fn).__name__)),
        kind=kind,
        key=("function", id(fn)),
    )


def classifier(
    name_or_path: str,
    label: str | int | None = None,
    *,
    log: bool = False,
    with_prompt: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    name: str | None = None,
) -> Scorer:
    """The probability a transformers sequence classifier gives to a label (positive).

    Args:
        name_or_path: a Hugging Face name or a local folder.
        label: the label's name, as in the model's ``id2label`` (case does not matter), or its
            index. A model with a single output, such as a reward model, needs none: its score is
            the raw output (real).
        log: the log-probability instead (real): r = log phi of f-DPG's scalar preferences.
        with_prompt: whether the model reads the prompt and the sample, not the sample alone.
        batch_size: texts per forward pass. Longer texts than the model can read are cut.
        device: ``auto``: the GPU where there is one.
        name: by default ``P(label)``.

    Raises:
        ScorerError: the model cannot be loaded, or has no such label.
    """
    score, chosen, raw = _load_classifier(name_or_path, label, log, batch_size, device)
    shown = Path(name_or_path).name if chosen is None else f"P({chosen})"
    return Scorer(
        lambda texts, prompts: score(
            [p + x for p, x in zip(prompts, texts, strict=True)] if with_prompt else texts
        ),
        name=name or (f"log {shown}" if log else shown),
        kind="real" if log or raw else "positive",
        key=("classifier", str(name_or_path), chosen, log, with_prompt),
    )


# ------------------------------------------------------------------------------------------------
# From YAML


def from_spec(spec: Any, folder: Path | None = None) -> Scorer:
    """A scorer from what a YAML file says of it.

    One key names the scorer, its value is the scorer's first argument, other keys are its options::

        contains: dog                            all: [{contains: dog}, {contains: cat}]
        {words: female.txt, mode: count}         any: [{contains: dog}, {contains: cat}]
        {python: my_scorers.py:politeness}       not: {contains: dog}
        {classifier: {name_or_path: my/model, label: positive, log: true}}

    Args:
        spec: such a mapping, or a ``Scorer`` or Python function (taken as it is).
        folder: where relative file names are looked up first (the YAML file's own folder).

    Raises:
        ScorerError: an unknown key (the nearest known one is named), or one the scorer rejects.
    """
    if isinstance(spec, Scorer):
        return spec
    if callable(spec):
        return function(spec)
    known = [*SCORERS, *_COMBINATIONS, "python"]
    if not isinstance(spec, Mapping):
        raise ScorerError(
            f"scorer: expected a mapping such as {{contains: dog}}, got {spec!r}. "
            f"Known: {', '.join(known)}"
        )
    named = [key for key in spec if key in known]
    if len(named) != 1:
        unknown = next((key for key in spec if key not in known), None)
        hint = nearest(str(unknown), known) if unknown is not None and not named else ""
        what = f"{named[0]} and {named[1]}" if named else f"{shorten(dict(spec))}"
        raise ScorerError(f"scorer: expected one of {', '.join(known)}, got {what}{hint}")
    kind = named[0]
    value = spec[kind]
    options = {key: option for key, option in spec.items() if key != kind}
    if kind in _COMBINATIONS:
        if options:
            raise ScorerError(f"{kind}: has no option {next(iter(options))!r}")
        return _COMBINATIONS[kind](value, folder)
    if kind == "python":
        _check_options("python", options, ["name", "kind"])
        return function(load_function(value, folder), **options)
    build = SCORERS[kind]
    parameters = list(inspect.signature(build).parameters)
    if isinstance(value, Mapping):  # {classifier: {name_or_path: ..., label: ...}}
        options = {**value, **options}
    else:
        options = {parameters[0]: value, **options}
    _check_options(kind, options, parameters)
    for key in FILES.get(kind, ()):
        if isinstance(options.get(key), str):
            options[key] = str(_find(options[key], folder))
    try:
        return build(**options)
    except TypeError as error:  # a required argument is missing
        raise ScorerError(f"{kind}: {error}") from error


def load_function(reference: str, folder: Path | None = None) -> Callable[..., Any]:
    """The function that ``file.py:name`` or ``package.module:name`` names.

    This runs the file, once until it changes, so that a function named twice is one: it is called
    only on what a user's configuration spells out.
    """
    source, colon, name = str(reference).rpartition(":")
    if not colon or not source or not name.isidentifier():
        raise ScorerError(
            f"python: expected 'file.py:function' or 'module:function', got {reference!r}"
        )
    if source.endswith(".py"):
        path = _find(source, folder)
        if not path.is_file():
            where = f"in {folder} (target.folder) or here" if folder else "here"
            raise ScorerError(
                f"python: no file {source!r} {where}. Way out: another name or folder"
            )
        try:
            module = _run_file(path.resolve(), path.stat().st_mtime_ns)
        except Exception as error:
            raise ScorerError(
                f"python: running {source!r} raised {type(error).__name__}: {error}"
            ) from error
    else:
        try:
            module = importlib.import_module(source)
        except Exception as error:
            raise ScorerError(
                f"python: importing {source!r} raised {type(error).__name__}: {error}. "
                "For a file, write its name with .py"
            ) from error
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])]
        raise ScorerError(f"python: {source!r} has no function {name!r}{nearest(name, names)}")
    result: Callable[..., Any] = found
    return result


def describe_scorers() -> str:
    """Every scorer, its options, and what they mean, for ``--help``."""
    lines = []
    for name, build in SCORERS.items():
        first, *options = inspect.signature(build).parameters.values()
        start = first.name.upper() if first.default is first.empty else first.default
        lines.append(f"{name}: {start}  {', '.join(o.name for o in options)}")
        text = re.sub(r":func:|``", "", inspect.cleandoc(str(build.__doc__)))
        about, _, arguments = text.partition("Args:\n")
        arguments = re.sub(r"\n {8}\s*", " ", arguments.partition("\n\n")[0])
        for meaning in (about.partition("\n\n")[0], *map(str.strip, arguments.splitlines())):
            lines += textwrap.wrap(meaning, 92, initial_indent="  ", subsequent_indent="    ")
    lines += [
        "python: FILE.py:FUNCTION  kind, name",
        "  A function of your own: given texts (and prompts, if it takes two arguments), returns a",
        "    number for each.",
        "  kind: what they are: boolean, positive, or real (the default).",
        "all: [SCORER, ...]  any: [SCORER, ...]  not: SCORER",
        "  Boolean scorers combined.",
    ]
    return "\n".join(lines)


def nearest(unknown: str, known: Iterable[str]) -> str:
    """``". Did you mean 'words'?"``, or nothing where no name is near."""
    close = difflib.get_close_matches(unknown, list(known), n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def shorten(text: object, limit: int = 100) -> str:
    """``repr`` that fits in a message."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 2]}…{shown[-1]}"


# ------------------------------------------------------------------------------------------------


def _phrase(text: str) -> str:
    """A pattern for a whole word or phrase, whatever characters it begins and ends with."""
    return r"(?<!\w)" + r"\s+".join(map(re.escape, text.split())) + r"(?!\w)"


def _sum(expression: str) -> int:
    """The value of whole numbers joined by ``+``, ``-`` and ``*``."""
    signed = re.findall(r"([+-]?)([^+-]+)", expression)
    return sum(
        (-1 if sign == "-" else 1) * math.prod(map(int, product.split("*")))
        for sign, product in signed
    )


def _expression(scorer: str, pattern: str, case: bool) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not pattern:
        raise ScorerError(f"{scorer}: `pattern` expected a regular expression, got {pattern!r}")
    try:
        return re.compile(pattern, 0 if case else re.IGNORECASE)
    except re.error as error:
        raise ScorerError(
            f"{scorer}: `pattern` {pattern!r} is not a regular expression: {error}"
        ) from error


def _compiles(program: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bad style
        try:
            compile(program, "sample", "exec", dont_inherit=True)
        # What is too deep or too long for the compiler is one of the last two.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _count_words(text: str) -> int:
    return len(re.findall(r"\w+(?:['\u2019-]\w+)*", text))


def _read_words(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ScorerError(
            f"words: cannot read the file {str(path)!r}: {error.strerror}. "
            "For words instead of a file, give a list: [he, him, his]"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if path.suffix == ".json":
        try:
            listed = json.loads(text)
        except ValueError as error:
            raise ScorerError(f"words: {str(path)!r} is not JSON: {error}") from error
        if not isinstance(listed, list):
            raise ScorerError(f"words: {str(path)!r} expected a list of strings")
        return listed
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and line[0] not in "#;"]


@functools.cache
def _run_file(path: Path, changed: int) -> ModuleType:
    """The module of a user's file as it was last ``changed``."""
    name = f"fdpg_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module


def _takes_prompts(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` must be, or asks by name to be, given a second argument."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        return False
    second = positional[1]
    return second.default is second.empty or second.name in ("prompts", "prompt")


def _require_boolean(operation: str, *scorers: object) -> None:
    for scorer in scorers:
        if not isinstance(scorer, Scorer) or scorer.kind != "boolean":
            raise ScorerError(f"{operation}: expected boolean scorers, got {scorer!r}")


def _combine(word: str, a: Scorer, b: Scorer, merge: Callable[[Tensor, Tensor], Tensor]) -> Scorer:
    _require_boolean("&" if word == "and" else "|", a, b)
    return Scorer(
        lambda texts, prompts: merge(a(texts, prompts), b(texts, prompts)),
        name=f"({a.name} {word} {b.name})",
        kind="boolean",
        key=(word, a._key, b._key),
    )


def _fold(word: str) -> Callable[[Any, Path | None], Scorer]:
    def build(specs: Any, folder: Path | None) -> Scorer:
        if not isinstance(specs, Sequence) or isinstance(specs, str) or not specs:
            raise ScorerError(f"{word}: expected a list of scorers, got {specs!r}")
        first, *rest = (from_spec(spec, folder) for spec in specs)
        for scorer in rest:
            first = first & scorer if word == "all" else first | scorer
        return first

    return build


def _check_options(kind: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in options:
        if key not in known:
            raise ScorerError(
                f"{kind}: unknown option {key!r}{nearest(str(key), known)} "
                f"Known: {', '.join(known)}"
            )


def _find(name: str, folder: Path | None) -> Path:
    """A file beside the configuration that names it, or else from the working folder."""
    path = Path(name).expanduser()
    beside = None if folder is None or path.is_absolute() else Path(folder) / path
    return beside if beside is not None and beside.exists() else path


def _load_classifier(
    name_or_path: str, label: str | int | None, log: bool, batch_size: int, device: str
) -> tuple[Callable[[Sequence[str]], Tensor], str | None, bool]:
    """The function over texts, the label's own name, whether there is a single raw output."""
    import transformers  # heavy, and needed by this scorer only

    from fdpg_fast.pretrained import no_progress_bar

    try:
        with no_progress_bar():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                name_or_path, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise ScorerError(
            f"classifier: cannot load {str(name_or_path)!r}: {first_line} Way out: give a folder "
            "that save_pretrained wrote (model and tokenizer), or a Hugging Face name where there "
            "is a network"
        ) from error
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = model.to(place).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:  # not a device, not there, or full
        first_line = (str(error).splitlines() or [""])[0]
        raise ScorerError(
            f"classifier: `device` must be auto, cpu, cuda or cuda:N, got {device!r}: {first_line}"
        ) from error
    known = (
        model.config.pad_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        0,
    )
    padding = next(token for token in known if token is not None)
    filler = next((t for t in (tokenizer.eos_token_id, tokenizer.unk_token_id) if t), padding)
    model.config.pad_token_id = padding  # decoder-only classifiers find the last token by it
    # A tokenizer without a limit says so by a huge number, which the tokenizer itself rejects.
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    longest = min(tokenizer.model_max_length, positions)
    raw = model.config.num_labels == 1
    chosen, index = (None, 0) if raw else _choose_label(model.config.id2label, label, name_or_path)
    if raw and log:
        raise ScorerError(
            f"classifier: {str(name_or_path)!r} has one raw output: `log` has no meaning"
        )
    independent = model.config.problem_type == "multi_label_classification"

    @torch.inference_mode()
    def score(texts: Sequence[str]) -> Tensor:
        values = []
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]), truncation=True, max_length=longest
            )["input_ids"]
            # Some tokenizers make no token of an empty text; models need one to read.
            batch = [ids or [filler] for ids in batch]
            width = max(map(len, batch))
            inputs = torch.tensor([ids + [padding] * (width - len(ids)) for ids in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch])
            output = model(input_ids=inputs.to(place), attention_mask=mask.to(place))
            logits = output.logits.double()
            if raw:
                values.append(logits[:, 0])
            elif independent:
                values.append(torch.nn.functional.logsigmoid(logits[:, index]))
            else:
                values.append(logits.log_softmax(-1)[:, index])
        result = torch.cat(values)
        return result if raw or log else result.exp()

    return score, chosen, raw


def _choose_label(
    id2label: Mapping[int, str], label: str | int | None, name_or_path: str
) -> tuple[str, int]:
    by_name = {str(text).lower(): int(index) for index, text in id2label.items()}
    index = label if isinstance(label, int) else by_name.get(str(label).lower())
    if label is None or index not in by_name.values():
        listed = ", ".join(map(str, id2label.values()))
        raise ScorerError(
            f"classifier: {str(name_or_path)!r} has the labels {listed}; "
            f"`label` expected one of them, got {label!r}" + nearest(str(label).lower(), by_name)
        )
    assert index is not None
    return str(id2label[index]), index


_COMBINATIONS: dict[str, Callable[[Any, Path | None], Scorer]] = {
    "all": _fold("all"),
    "any": _fold("any"),
    "not": lambda spec, folder: ~from_spec(spec, folder),
}

SCORERS: dict[str, Callable[..., Scorer]] = {
    "contains": contains,
    "regex": regex,
    "words": words,
    "lexicon": lexicon,
    "mentions": mentions,
    "compiles": compiles,
    "equation": equation,
    "length": length,
    "classifier": classifier,
}

# Arguments that may be names of files.
FILES = {
    "words": ("source",),
    "lexicon": ("positive", "negative"),
    "classifier": ("name_or_path",),
}
