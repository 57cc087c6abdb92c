"""Everything a run can be told: one frozen dataclass per part, read from YAML and the command line.

The dataclasses are the only list of keys. YAML files, ``--part.key value`` on the command line,
keyword arguments of :class:`fdpg_fast.Trainer` and ``fdpg train --help`` are all made from them, so
a key is added by adding a field and a line to its docstring. Key names are unique over all parts,
which lets Python callers leave the part out.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "AdapterConfig",
    "Config",
    "ConfigError",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimiserConfig",
    "PromptsConfig",
    "RunConfig",
    "SamplingConfig",
    "TargetConfig",
    "nearest",
    "plain",
    "recipes",
    "to_yaml",
]


# What a scorer is told. Not Any, of which jsonargparse reads texts as YAML once more (a regex such
# as [a-z] became a list), and not list[Any], of whose items it does. Text comes first: it stays.
Value = str | bool | int | float | list | dict | None  # type: ignore[type-arg]


class ConfigError(ValueError):
    """A key or value that a run cannot be made from; the message names it and the way out."""


@dataclass(frozen=True)
class ModelConfig:
    """The language model: base a(x), and where the policy starts.

    Attributes:
        name: Hugging Face name or local folder; empty: the small story model inside the package;
            embedded:arithmetic: its model of sums
        device: auto, cpu, cuda or cuda:N
        compute: arithmetic of the forward and backward pass; weights are always kept in fp32
        attention: auto, or the name of one of the attention functions that `fdpg env` lists
        trust_remote_code: allow the checkpoint to bring Python code of its own
        activation_checkpointing: recompute activations in the backward pass: slower, less memory
        eos_ids: tokens that end a sample, by their ids; null: what the checkpoint says
    """

    name: str = ""
    device: str = "auto"
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    attention: str = "auto"
    trust_remote_code: bool = False
    activation_checkpointing: bool = False
    eos_ids: list[int] | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """A small adapter that learns while the model's own weights stay (`pip install peft`).

    Attributes:
        peft: none: all weights learn; or a kind of adapter that the package peft has, such as lora,
            which wants about ten times the learning rate
        rank: of the two matrices whose product lora adds to a layer's
        alpha: that product is scaled by alpha / rank
        target_modules: layers that get one: ends of their names, or all-linear: all but the output
        options: further settings of this kind in peft, as in {use_rslora: true}
    """

    peft: str = "none"
    rank: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    options: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptsConfig:
    """What samples continue.

    Attributes:
        source: a text, a list of texts, or a .txt (one per line) or .jsonl file, which a YAML file
            may name as seen from beside it; empty: no prompt
        prompts_per_step: prompts in each step
        shuffle: visit many prompts in a new order every epoch
    """

    source: str | list[str] = ""
    prompts_per_step: int = 1
    shuffle: bool = True


@dataclass(frozen=True)
class TargetConfig:
    """The distribution wanted of the samples; parts multiply.

    Attributes:
        constrain: scorers every sample must satisfy, as in [{contains: dog}]
        moments: features and their wanted means, as in [{words: [she, her], moment: 0.5}]
        reward: a scorer and its temperature, as in {length: words, beta: 2.0}
        times: factors that are never negative, as in [{python: mine.py:politeness}]
        smooth: floor of the constraints, such as 1e-6, so that no sample is impossible
        python: FILE.py:FUNCTION that takes a rollout and returns its log score, run as given
        folder: where relative file names are looked up first; empty: beside the YAML file
        fit_samples: samples of the base that moments are fitted on, at least 4 of each prompt (as
            many again test the fit)
        built_in_python: written by a run whose target is a Python object: what that object was
    """

    constrain: list[dict[str, Value]] = field(default_factory=list)
    moments: list[dict[str, Value]] = field(default_factory=list)
    reward: dict[str, Value] | list[dict[str, Value]] | None = None
    times: list[dict[str, Value]] = field(default_factory=list)
    smooth: float | None = None
    python: str | None = None
    folder: str | None = None
    fit_samples: int = 2048
    built_in_python: str | None = None

    def spec(self) -> dict[str, Any]:
        """The parts that were asked for, as :func:`fdpg_fast.targets.from_spec` reads them."""
        parts = ("constrain", "moments", "reward", "times", "smooth", "python")
        given = {part: getattr(self, part) for part in parts}
        return {part: value for part, value in given.items() if value not in (None, [])}


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn.

    Attributes:
        max_new_tokens: longest sample, in tokens
        samples_per_prompt: samples of each prompt in each step
        sampler_batch: samples drawn at a time; changes speed and memory, not the samples
        deterministic: the same bits in any batch, also where rounding decides between two tokens;
            draws 64 samples at a time
        stop: FILE.py:FUNCTION that ends samples early: given the text sampled so far, is it whole?
        stop_in_python: written by a run whose stop is a Python function: the name of that
        adaptive_proposal: sample from a copy that becomes the policy only when that is closer to
            the target (KL-adaptive DPG)
        proposal_every: steps between comparisons of that copy with the policy
    """

    max_new_tokens: int = 40
    samples_per_prompt: int = 256
    sampler_batch: int = 256
    deterministic: bool = False
    stop: str | None = None
    stop_in_python: str | None = None
    adaptive_proposal: bool = False
    proposal_every: int = 10


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, and how its gradient is estimated.

    Attributes:
        divergence: f-divergence between policy and target; the names are listed above
        baseline: auto is loo with two or more samples per prompt, else ema(0.99); listed above
        log_z: normaliser from all samples so far, from each batch, or from the base before training
        log_z_samples: samples of the base per prompt that a frozen log_z is made from
        steps_per_batch: optimiser steps on each batch of samples
        behaviour: log q of the samples: sampler: as recorded when they were drawn; rescore: by a
            forward pass of the proposal as the trainer computes it, which costs that pass
        ratio_clip: largest importance ratio policy/proposal; .inf: not truncated
        reward_clip: largest absolute pseudo-reward; .inf: not clipped
    """

    divergence: str = "js"
    baseline: str = "auto"
    log_z: Literal["running", "batch", "frozen"] = "running"
    log_z_samples: int = 2048
    steps_per_batch: int = 1
    behaviour: Literal["sampler", "rescore"] = "sampler"
    ratio_clip: float = math.inf
    reward_clip: float = math.inf


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: largest step size; far above the default, runs leave the language behind
        schedule: what follows the warm-up: constant, linear to zero, or cosine to zero
        warmup_steps: steps of linear growth from zero
        weight_decay: of AdamW
        betas: of AdamW
        epsilon: of AdamW
        max_grad_norm: gradients are scaled down to this norm; .inf: never
        micro_batch: samples per forward and backward pass; null: as many as make 4096 tokens with
            little padding; changes memory, not the gradient
    """

    learning_rate: float = 3e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = math.inf
    micro_batch: int | None = None


@dataclass(frozen=True)
class RunConfig:
    """How long, and what is written down.

    Attributes:
        steps: batches of samples to train on
        seed: of samples and prompt order
        log_every: steps between looks at the numbers (every step is recorded all the same)
        table_every: steps between tables of samples; 0: none
        table_rows: samples in such a table
        checkpoint_every: steps between checkpoints; the last step always has one
        keep_checkpoints: newest checkpoints to keep
        evaluation_samples: fresh samples for the comparison of before and after; 0: no comparison
        max_gap: largest mean difference in nats per token between the log-prob of sampler and
            trainer; null: 1e-3 in fp32, 5e-2 in bf16, 1e-2 in fp16
    """

    steps: int = 40
    seed: int = 0
    log_every: int = 1
    table_every: int = 10
    table_rows: int = 4
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    evaluation_samples: int = 1024
    max_gap: float | None = None


@dataclass(frozen=True)
class Config:
    """One whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        at_least_one = (
            "prompts_per_step",
            "fit_samples",
            "max_new_tokens",
            "samples_per_prompt",
            "sampler_batch",
            "proposal_every",
            "log_z_samples",
            "steps_per_batch",
            "micro_batch",
            "steps",
            "log_every",
            "table_rows",
            "checkpoint_every",
            "keep_checkpoints",
            "rank",
            "alpha",
        )
        not_negative = ("warmup_steps", "weight_decay", "table_every", "evaluation_samples", "seed")
        positive = ("learning_rate", "epsilon", "ratio_clip", "reward_clip", "max_grad_norm")
        finite = ("learning_rate", "epsilon", "weight_decay")
        for part, key, value in self._items():
            name = f"{part}.{key}"
            if key in at_least_one and value is not None and value < 1:
                raise ConfigError(f"config: `{name}` expected at least 1, got {value}")
            if key in not_negative and not value >= 0:
                raise ConfigError(f"config: `{name}` expected 0 or more, got {value}")
            if key in positive and not value > 0:
                raise ConfigError(f"config: `{name}` expected a number above 0, got {value}")
            if key in finite and value == math.inf:
                raise ConfigError(f"config: `{name}` expected a finite number, got {value}")
            if key == "betas" and not all(0 <= beta < 1 for beta in value):
                raise ConfigError(
                    f"config: `{name}` expected two numbers of at least 0 and below 1, got {value}"
                )
        if self.run.max_gap is not None and not self.run.max_gap > 0:
            raise ConfigError(f"config: `run.max_gap` expected above 0, got {self.run.max_gap}")
        if self.sampling.samples_per_prompt == 1 and self.objective.log_z == "batch":
            raise ConfigError(
                "config: `sampling.samples_per_prompt` expected 2 and more where `objective.log_z` "
                "is batch, got 1: Z would be the sample's own weight, and its reward no news. Way "
                "out: more samples of fewer prompts, or log_z frozen"
            )
        if self.run.evaluation_samples == 1:
            raise ConfigError("config: `run.evaluation_samples` expected 0, or 2 and more, got 1")

    def _items(self) -> Iterator[tuple[str, str, Any]]:
        for part in dataclasses.fields(self):
            values = getattr(self, part.name)
            for key in dataclasses.fields(values):
                yield part.name, key.name, getattr(values, key.name)

    @property
    def samples_per_step(self) -> int:
        """Samples drawn in each step, over all its prompts."""
        return self.prompts.prompts_per_step * self.sampling.samples_per_prompt

    @property
    def samples_to_measure(self) -> int:
        """Fresh samples of each model for who asks, where the run itself may want none."""
        return self.run.evaluation_samples or RunConfig.evaluation_samples

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """Reads a recipe's name, a YAML file or a mapping, then overrides.

        Args:
            source: name of a recipe in the package, path of a YAML file, or its content.
            overrides: as on the command line: ``["--optimiser.learning_rate", "1e-4"]``.

        Raises:
            ConfigError: no such recipe or file, a file that is not YAML, an unknown key (the
                message names the nearest known one), or a value of the wrong type or range.
        """
        if isinstance(source, Mapping):
            content, where = plain(source), "config"
        else:
            path = find(source)
            content, where = _load(path), path.name
        _check_keys(content, where)
        if not isinstance(source, Mapping):
            _set_folder(content, path.resolve().parent)
        _check_options(overrides)
        parser = argument_parser()
        try:
            namespace = parser.parse_object(content)
            namespace = parser.parse_args(list(overrides), namespace=namespace)
        except Exception as error:  # jsonargparse raises several types; all of them are bad input
            raise ConfigError(_reword(str(error))) from error
        return cls.from_dict(namespace.as_dict())

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Config:
        """Builds from complete or partial content whose values have the right types."""
        _check_keys(content, "config")
        parts = {
            name: part(**{key: _tuple(value) if key == "betas" else value for key, value in given})
            for name, part in _parts().items()
            if (given := (content.get(name) or {}).items())
        }
        return cls(**parts)

    def replace(self, **keys: Any) -> Config:
        """The same run with some keys changed, named without their part: ``replace(steps=10)``."""
        home = {key: part for part, key, _ in self._items()}
        changes: dict[str, dict[str, Any]] = {}
        for key, value in keys.items():
            if key not in home:
                raise ConfigError(f"config: unknown key `{key}`. {nearest(key, home)}")
            changes.setdefault(home[key], {})[key] = value
        content = dataclasses.asdict(self)
        for part, values in changes.items():
            content[part].update(values)
        return Config.read(content)

    def dump(self) -> str:
        """The whole run as YAML, every default written out."""
        return to_yaml(plain(dataclasses.asdict(self)))

    def located(self) -> Config:
        """The same run for every working folder: folders and files that are here, named in full."""
        name, source, folder = self.model.name, self.prompts.source, self.target.folder
        if name != "default" and not name.startswith("embedded:") and os.path.isdir(name):
            name = os.path.abspath(name)
        if isinstance(source, str) and os.path.isfile(source):
            source = os.path.abspath(source)
        if folder is None and (self.target.spec() or self.sampling.stop):  # what may name files
            folder = os.getcwd()
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, name=name),
            prompts=dataclasses.replace(self.prompts, source=source),
            target=dataclasses.replace(self.target, folder=folder),
        )

    def difference(self, other: Config) -> list[str]:
        """Keys whose values differ, as ``part.key``; not by where the files they name lie now."""
        one, two = (config.located()._without_folder() for config in (self, other))
        theirs = {(part, key): value for part, key, value in two._items()}
        ours = one._items()
        return [f"{part}.{key}" for part, key, value in ours if value != theirs[part, key]]

    def _without_folder(self) -> Config:
        """The same run, with names of files as its YAML file has them, wherever that is."""
        folder, source = self.target.folder, self.prompts.source
        if folder and isinstance(source, str):
            source = source.removeprefix(os.path.join(folder, ""))
        return dataclasses.replace(
            self,
            prompts=dataclasses.replace(self.prompts, source=source),
            target=dataclasses.replace(self.target, folder=None),
        )


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def recipes() -> dict[str, Path]:
    """The recipes of the package: name -> YAML file."""
    folder = Path(str(resources.files("fdpg_fast") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def describe(recipe: Path) -> str:
    """The first comment line of a recipe: what it shows."""
    first = recipe.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip()


def find(source: str | Path) -> Path:
    """The YAML file meant by a recipe's name or a path."""
    text = str(source)
    if text in recipes():
        return recipes()[text]
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(
            f"config: no file `{source}`. Way out: check the path, or use a recipe: "
            f"{', '.join(recipes())}"
        )
    raise ConfigError(f"config: no recipe or file `{source}`. {nearest(text, recipes())}")


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Half of an error message: the known word closest to the unknown one, or all of them."""
    initials = ["".join(part[0] for part in key.split("_") if part) for key in known]
    close = [key for key, short in zip(known, initials, strict=True) if short == word]
    close = close or difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    listed = ", ".join(known)
    return f"Did you mean `{close[0]}`? Known: {listed}" if close else f"Known: {listed}"


def argument_parser() -> ArgumentParser:
    """The parser of ``--part.key value``, made from the dataclasses."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_class_arguments(Config, None)
    return parser


def describe_keys() -> str:
    """Every key with its default and meaning, part by part, for ``--help``."""
    lines = []
    for part, kind in _parts().items():
        summary, _, attributes = inspect.cleandoc(str(kind.__doc__)).partition("\n\nAttributes:\n")
        lines.append(summary)
        meanings = re.sub(r"\n {8}\s*", " ", attributes)
        default = kind()
        for key, meaning in re.findall(r"^    (\w+): (.*)$", meanings, flags=re.MULTILINE):
            value = getattr(default, key)
            value = list(value) if isinstance(value, tuple) else value
            shown = yaml.safe_dump(value, default_flow_style=True)
            shown = shown.removesuffix("...\n").strip().replace("\n", " ")
            lines.append(f"  --{part}.{key} [{shown}]")
            lines += textwrap.wrap(meaning, 88, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines)


@functools.cache
def _parts() -> dict[str, type[Any]]:
    hints = get_type_hints(Config)
    return {part.name: hints[part.name] for part in dataclasses.fields(Config)}


@functools.cache
def _keys() -> tuple[str, ...]:
    return tuple(
        f"{name}.{key.name}" for name, part in _parts().items() for key in dataclasses.fields(part)
    )


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which reads 1e-4 as a number (PyYAML alone reads it as text), and
    refuses a key that is there twice, as YAML does (PyYAML alone drops the first)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()  # else: refused below
        seen = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is there twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, of which the loader, and YAML's own, read every text as it was."""


# Without double quotes the control character NEL would come back as a newline.
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None
    ),
)

for _kind in (_Loader, _Dumper):  # the latter puts quotes around a text that looks like this
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def plain(value: Any) -> Any:
    """As YAML has it: numbers, arrays and tensors of NumPy and torch in Python's own types."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def to_yaml(content: Mapping[str, Any]) -> str:
    """YAML of plain types, in the given order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: cannot read `{path}`: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config: `{path}` is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"config: `{path}` expected `part:` and indented `key: value` lines, "
            f"got a {type(content).__name__}"
        )
    return content


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    for part, values in content.items():
        if part not in _parts():
            raise ConfigError(f"{where}: unknown part `{part}`. {_nearest_key(str(part))}")
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{where}: `{part}` expected indented `key: value` lines, got {values!r}"
            )
        known = [key.name for key in dataclasses.fields(_parts()[part])]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"{where}: unknown key `{part}.{key}`. {_nearest_key(f'{part}.{key}')}"
                )


def _set_folder(content: dict[str, Any], folder: Path) -> None:
    """Relative file names in a YAML file are looked up beside it first."""
    target, sampling = (content.get(part) or {} for part in ("target", "sampling"))
    if target or sampling.get("stop"):  # what may name files
        content["target"] = {"folder": str(folder), **target}
    prompts = content.get("prompts") or {}
    source = prompts.get("source")
    if isinstance(source, str) and Path(source).suffix:
        beside = os.path.join(folder, source)
        if os.path.isfile(beside):  # a text may be too long to ask Path
            prompts["source"] = beside


def _check_options(overrides: Sequence[str]) -> None:
    for word in overrides:
        if word.startswith("--"):
            key = word[2:].split("=", 1)[0]
            if key in _parts():
                keys = ", ".join(f"--{known}" for known in _keys() if known.startswith(f"{key}."))
                raise ConfigError(f"config: `--{key}` is a part, not a key. Its keys: {keys}")
            if key not in _keys():
                raise ConfigError(f"config: unknown option `--{key}`. {_nearest_key(key, '--')}")


def _nearest_key(key: str, prefix: str = "") -> str:
    """The nearest ``part.key``: by the whole name first, then by the key alone in any part."""
    leaf = key.rsplit(".", 1)[-1]
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in _keys()}
    close = (
        ([by_leaf[leaf]] if leaf in by_leaf else [])
        or difflib.get_close_matches(key, (*_keys(), *_parts()), n=1, cutoff=0.6)
        or [by_leaf[k] for k in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.5)]
    )
    if close:
        return f"Did you mean `{prefix}{close[0]}`? Way out: `fdpg train --help` lists every key"
    return f"Known parts: {', '.join(_parts())}. Way out: `fdpg train --help` lists every key"


def _reword(message: str) -> str:
    """One line in this project's words from jsonargparse's."""
    found = re.search(r'[Kk]ey "([^"]+)"[:.]?\s*(.*)', message, flags=re.DOTALL)
    if not found:
        return "config: " + " ".join(message.split())
    key, rest = found.groups()
    got = re.findall(r"(?:Got|Given) value: (.*)", rest)
    hint = _type_name(key)
    if got and hint:
        return f"config: `{key}` expected {hint}, got {got[-1].strip()}"
    return f"config: `{key}`: " + " ".join(rest.split())


def _type_name(key: str) -> str:
    part, _, leaf = key.partition(".")
    if part not in _parts() or not leaf:
        return ""
    declared = _parts()[part].__dataclass_fields__.get(leaf.split(".")[0])
    if declared is None:
        return ""
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "str | list[str]": "a text or a list of texts",
        "float | None": "a number or null",
        "int | None": "a whole number or null",
        "str | None": "text or null",
        "list[int] | None": "a list of whole numbers or null",
        "tuple[float, float]": "a list of two numbers",
        "list[dict[str, Value]]": "a list of `{scorer: argument}`, as in [{contains: dog}]",
        "dict[str, Value]": "`{setting: value}`",
        "dict[str, Value] | list[dict[str, Value]] | None": "`{scorer: argument, beta: number}`",
    }
    choices = re.fullmatch(r"Literal\[(.*)\]", declared.type)
    if choices:
        return "one of " + choices.group(1).replace('"', "")
    return words.get(str(declared.type), str(declared.type))


def _tuple(value: Any) -> tuple[float, float]:
    first, second = value
    return float(first), float(second)
