"""The `fdpg` command.

Nothing heavy is imported until a command needs it, so help is quick. A mistake of the user gives
one message and exit code 2; `--debug` shows where in the program it was found.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdpg_fast import config as configuration
from fdpg_fast._version import __version__
from fdpg_fast.config import Config, ConfigError

if TYPE_CHECKING:
    from fdpg_fast.run_directory import RunDirectory

__all__ = ["main"]

BUDGET_SPENT, USAGE_ERROR = 1, 2

BUDGET, LOOK = 10_000, 1024  # of rejection: most proposals for a prompt; those looked at first

EPILOG = """examples:
  fdpg train demo --out runs/demo                       a first run, two minutes on a laptop
  fdpg train dog --model.name gpt2 --out runs/dog       another model
  fdpg train my.yaml --optimiser.learning_rate 1e-5 --out runs/slow
  fdpg train --resume --out runs/slow                   go on where it stopped
  fdpg sample runs/dog -n 5
  fdpg sample runs/dog --qrs accept=0.2                  nearer to the target, five times slower
  fdpg report runs/dog runs/slow
  fdpg sweep dog --divergences kl,tv,js --seeds 3 --out sweeps/dog
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    formatwarning = warnings.formatwarning
    parser = _parser()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ∞ and π shows ? instead
            stream.reconfigure(errors="replace")
    try:
        # Python's own form of a warning shows the line of code that gave it.
        warnings.formatwarning = lambda message, *where: f"fdpg: warning: {message}\n"
        if not given:
            parser.print_help()
            return USAGE_ERROR
        if given[0] in WITH_KEYS:
            return WITH_KEYS[given[0]](given[1:])
        known = parser.parse_args(given)
        command: Callable[[argparse.Namespace], int] = known.run
        return command(known)
    except KeyboardInterrupt:
        _end_at_once_if_asked_again()
        print("fdpg: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `fdpg sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        explained = _explained(error)
        if debug or explained is None:
            raise
        print(f"fdpg: {explained}", file=sys.stderr)
        return USAGE_ERROR
    finally:
        warnings.formatwarning = formatwarning


def _end_at_once_if_asked_again() -> None:
    """What remains is the end of the interpreter, whose own work would answer with a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


def _explained(error: Exception) -> str | None:
    """What to tell the user, or None for a fault of the program, which needs its traceback."""
    if isinstance(error, RuntimeError) and (
        "out of memory" in str(error) or "can't allocate memory" in str(error)
    ):
        return (
            f"not enough memory: {str(error).splitlines()[0]} Way out: a smaller "
            "--optimiser.micro_batch or --sampling.sampler_batch (the result stays the same), or "
            "--model.activation_checkpointing true"
        )
    if type(error).__module__.startswith("fdpg_fast."):
        return str(error)
    expected = isinstance(error, ValueError | OSError | ImportError) and _raised_by_package(error)
    return str(error) if expected else None


def _raised_by_package(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(
        "fdpg_fast"
    )


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


def train(words: Sequence[str]) -> int:
    """`fdpg train`: a whole run, from a recipe or file to a report."""
    parser = _KeysParser("train")
    parser.add_argument("--resume", action="store_true")
    recipe, known, overrides = parser.read(words)
    if known.help:
        print(_train_help())
        return 0
    from fdpg_fast.run_directory import RunDirectory

    if recipe is None and not known.resume:
        raise ConfigError(
            f"train: expected a recipe or a YAML file. {configuration.nearest('', _names())}"
        )
    if known.out is None:
        raise ConfigError("train: expected --out DIR, the folder that the run is written to")
    if recipe is None:
        config = _resumed(RunDirectory.open(known.out).config(), overrides)
    else:
        config = Config.read(recipe, overrides)

    from fdpg_fast.trainer import Trainer

    Trainer.from_config(config, out=known.out, resume=known.resume).train()
    return 0


def sweep(words: Sequence[str]) -> int:
    """`fdpg sweep`: several divergences and seeds, measured alike, in one report."""
    parser = _KeysParser("sweep")
    parser.add_argument("--divergences")
    parser.add_argument("--seeds", type=_positive)
    recipe, known, overrides = parser.read(words)
    if known.help:
        print(_sweep_help())
        return 0
    if known.out is None:
        raise ConfigError("sweep: expected --out DIR, the folder that the sweep is written to")
    if any(word.partition("=")[0] == "--objective.divergence" for word in overrides):
        raise ConfigError(
            "sweep: --objective.divergence is what differs from run to run. Way out: --divergences "
            "with the names of those wanted"
        )

    from fdpg_fast.sweep import Sweep

    if recipe is None:  # goes on with what is there
        plan = Sweep.read_plan(known.out)
        config = _resumed(Config.read(plan["config"]), overrides)
        names, seeds = plan["divergences"], plan["seeds"]
    else:
        config, names, seeds = Config.read(recipe, overrides), [], 1
    if known.divergences is not None:
        names = [name.strip() for name in known.divergences.split(",")]
    swept = Sweep(config, known.out, divergences=names, seeds=known.seeds or seeds)
    measured = swept.run()
    _show_cross_table(measured)
    print(f"models  {swept.folder.path}/DIVERGENCE/SEED/model")
    print(f"report  {swept.folder.report}")
    return 0


def sample(known: argparse.Namespace) -> int:
    """`fdpg sample`: texts from a tuned model, or by rejection from its target."""
    from fdpg_fast.run_directory import RunDirectory

    run = RunDirectory.open(known.folder)
    rejecting = known.qrs is not None or known.reject
    if known.qrs is not None and known.reject:
        raise ConfigError("sample: --qrs and --reject are two ways to sample. Way out: one of them")
    if not rejecting and (known.proposal, known.budget, known.look) != (None, None, None):
        raise ConfigError("sample: --proposal, --budget and --look belong to --qrs or --reject")
    if rejecting:
        return _sample_by_rejection(known, run)
    from fdpg_fast.evaluation import draw_texts

    texts = draw_texts(
        run, prompt=known.prompt, count=known.n, max_new_tokens=known.tokens, seed=known.seed
    )
    for prompt, text in texts:
        _show_sample(known, prompt, text)
    return 0


def _sample_by_rejection(known: argparse.Namespace, run: RunDirectory) -> int:
    """Texts go to stdout as they come; all that is said of them, to stderr."""
    import itertools
    import secrets

    from rich.console import Console

    from fdpg_fast import rejection
    from fdpg_fast.partition import warning_of_few
    from fdpg_fast.progress import acceptance_bar, show_table

    wish = None if known.qrs is None else rejection.Wish.parse(known.qrs)  # before models load
    drawn = rejection.Rejection.of_run(
        run,
        proposal=known.proposal or "tuned",
        prompt=known.prompt,
        count=known.n,
        max_new_tokens=known.tokens,
        seed=secrets.randbits(32) if known.seed is None else known.seed,
    )
    console = Console(stderr=True)
    log_beta = -math.inf
    if wish is not None:
        curve = drawn.look(known.look or LOOK)
        log_beta = wish.log_beta(curve)
        found = {point.log_beta: point for point in (*curve.points(), curve.at(log_beta))}
        points = [found[at] for at in sorted(found)]
        title = f"quasi-rejection sampling: {'/'.join(run.path.resolve().parts[-2:])}"
        law = drawn.law(log_beta)
        run.write_text(run.curve, rejection.curve_page(title, law, curve, points, log_beta))
        if few := warning_of_few(curve.samples // len(drawn.prompts), len(drawn.prompts)):
            print(f"warning: {few} Way out: a larger --look", file=sys.stderr)
        table = rejection.curve_table(points, log_beta)
        show_table(console, f"from {curve.samples} proposals (* chosen)", *table)
        print(f"curve   {run.curve}", file=sys.stderr)
    print(f"law     {drawn.law(log_beta)}", file=sys.stderr)

    each, budget = -(-known.n // len(drawn.prompts)), known.budget or BUDGET
    accepted = 0
    with acceptance_bar(console, known.n, lambda: drawn.proposals) as bar:
        for prompt, text in itertools.islice(drawn.take(log_beta, each, budget), known.n):
            _show_sample(known, prompt, text)
            accepted += 1
            bar.advance(bar.task_ids[0])
    print(f"took    {accepted} of {drawn.proposals} proposals", file=sys.stderr)
    if accepted == known.n:
        return 0
    print(
        f"fdpg: sample: {accepted} of {known.n} texts, then the budget of {budget} proposals for a "
        "prompt was spent. Way out: a larger --budget, or one that accepts more: a smaller beta, "
        "or a model tuned further",
        file=sys.stderr,
    )
    return BUDGET_SPENT


def _show_sample(known: argparse.Namespace, prompt: str, text: str) -> None:
    from fdpg_fast.progress import joined

    if known.jsonl:
        import json

        print(json.dumps({"prompt": prompt, "sample": text}, ensure_ascii=False), flush=True)
    else:
        print(joined(prompt, text), end="\n\n", flush=True)


def evaluate(known: argparse.Namespace) -> int:
    """`fdpg evaluate`: measures base and tuned model on fresh samples."""
    from rich.console import Console

    from fdpg_fast.evaluation import evaluate_run
    from fdpg_fast.progress import show_evaluation
    from fdpg_fast.run_directory import RunDirectory

    run = RunDirectory.open(known.folder)
    evaluation = evaluate_run(run, samples=known.samples, seed=known.seed)
    show_evaluation(Console(), evaluation)
    print(f"written to {run.evaluation}")
    return 0


def report(known: argparse.Namespace) -> int:
    """`fdpg report`: the plots of one run, or of several in one file."""
    from fdpg_fast.report import write_report
    from fdpg_fast.run_directory import RunDirectory

    runs: list[RunDirectory] = [RunDirectory.open(folder) for folder in known.folders]
    path = known.to or (runs[0].report if len(runs) == 1 else Path("comparison.html"))
    print(write_report(runs, path))
    return 0


def env(known: argparse.Namespace) -> int:
    """`fdpg env`: what is installed, what is used, and why."""
    from fdpg_fast.environment import describe

    rows = list(describe())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Argparse, whose complaints are one line like all others of this program."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}. Way out: `{self.prog} --help`")


class _KeysParser(_Parser):
    """Reads a recipe, what the command itself takes, and leaves the keys of the config."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"fdpg {command}", add_help=False, allow_abbrev=False)
        self.add_argument("--out", type=_path)
        self.add_argument("-h", "--help", action="store_true")

    def read(self, words: Sequence[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
        """The recipe, if one is named; what the command takes; the rest."""
        # The recipe first, as everything after it may be a key and its value.
        recipe = words[0] if words and not words[0].startswith("-") else None
        return recipe, *self.parse_known_args(words[recipe is not None :])


def _path(name: str) -> Path:
    if not name:  # as a shell makes of a variable that is not set; Path takes it for "here"
        raise argparse.ArgumentTypeError("expected a path, got an empty name")
    return Path(name)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fdpg",
        description="Tune a language model toward any distribution you can describe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fdpg-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    commands.add_parser("train", help="tune a model, as a recipe or a YAML file says")
    commands.add_parser("sweep", help="compare divergences: several runs, one report")
    part = _command(commands, "sample", sample, "draw texts from the tuned model of a run")
    part.add_argument("folder", metavar="DIR", type=_path)
    part.add_argument("-n", type=_positive, default=3, help="texts (default: 3)")
    part.add_argument(
        "--prompt",
        help="what they continue: a text, or a .txt or .jsonl file (default: the run's own)",
    )
    part.add_argument("--tokens", type=_positive, help="longest text (default: the run's)")
    part.add_argument("--seed", type=int, help="for the same texts again (default: new ones)")
    part.add_argument("--jsonl", action="store_true", help="one JSON object per text")
    by = part.add_argument_group(
        "by rejection", "samples that are nearer to the target than the model, at the price of more"
    )
    by.add_argument(
        "--qrs",
        metavar="WISH",
        help="accept with probability min(1, P / (beta q)); WISH is beta=2.5, or an acceptance "
        "rate (accept=0.1), or a total variation to the target (tv=0.05)",
    )
    by.add_argument(
        "--reject", action="store_true", help="accept all that the target does not forbid"
    )
    by.add_argument("--proposal", choices=("tuned", "base"), help="what q is (default: tuned)")
    by.add_argument(
        "--budget", type=_positive, help=f"most proposals for a prompt (default: {BUDGET})"
    )
    by.add_argument("--look", type=_positive, help=f"samples to choose beta by (default: {LOOK})")

    part = _command(commands, "evaluate", evaluate, "measure base and tuned model of a run")
    part.add_argument("folder", metavar="DIR", type=_path)
    part.add_argument("--samples", type=_positive, help="fresh samples (default: the run's)")
    part.add_argument("--seed", type=int, help="of the samples (default: the last one's + 1)")

    part = _command(commands, "report", report, "plots and samples of runs, as one HTML file")
    part.add_argument("folders", metavar="DIR", type=_path, nargs="+")
    part.add_argument(
        "--to", type=_path, help="file (default: DIR/report.html, or comparison.html for several)"
    )

    _command(commands, "env", env, "what is installed, what is used, and why")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    part: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, allow_abbrev=False
    )
    part.set_defaults(run=run)
    return part


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "whole number above 0"  # argparse puts it into its message


def _names() -> dict[str, Path]:
    return configuration.recipes()


def _listed_recipes() -> str:
    width = max(map(len, _names()))
    return "\n".join(f"  {n:<{width}}  {configuration.describe(p)}" for n, p in _names().items())


def _train_help() -> str:
    from fdpg_fast.baselines import describe_baselines
    from fdpg_fast.divergences import describe_divergences
    from fdpg_fast.scorers import describe_scorers

    return f"""usage: fdpg train RECIPE|FILE.yaml [--part.key value ...] --out DIR [--resume]

A run: draws samples, weighs them by the target, moves the model; ends with a comparison of before
and after, a model that transformers loads, and a report. Ctrl-C saves first.

  RECIPE|FILE.yaml  a recipe below, or a file of the same form
  --out DIR         where everything is written
  --resume          go on with the run in DIR from its newest checkpoint

recipes:
{_listed_recipes()}

divergences (--objective.divergence), between policy pi and target p:
{_indent(describe_divergences())}

baselines (--objective.baseline):
{_indent(describe_baselines())}

scorers (in --target.constrain, .moments, .reward, .times), as in "[{{contains: dog, case: true}}]":
{_indent(describe_scorers())}

keys, with their defaults:

{configuration.describe_keys()}"""


def _sweep_help() -> str:
    from fdpg_fast.divergences import describe_divergences

    return f"""usage: fdpg sweep [RECIPE|FILE.yaml] [--divergences kl,tv,js] [--seeds N]
                  [--part.key value ...] --out DIR

Trains every divergence with every seed, each as a run of its own in DIR/<divergence>/<seed>; then
measures all of them and the base on the same fresh samples, and writes one report: which divergence
gets how near to the target by each measure, at what price in diversity. The same command again, or
without a recipe, goes on where it was stopped; more divergences or seeds add to what is there.

  --divergences     what is minimised, with commas between (default: kl, reverse_kl, tv, js, but
                    for those that are infinite on the target)
  --seeds           runs of each (default: 1); the first is --run.seed
  --out DIR         where everything is written
  --part.key value  settings of all runs, as `fdpg train --help` lists them;
                    --run.evaluation_samples are the fresh samples of each model

recipes:
{_listed_recipes()}

divergences, between policy pi and target p:
{_indent(describe_divergences())}"""


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _resumed(config: Config, overrides: Sequence[str]) -> Config:
    """A saved config with changes from the command line."""
    import dataclasses

    return Config.read(dataclasses.asdict(config), overrides) if overrides else config


def _show_cross_table(measured: dict[str, Any]) -> None:
    """Trained on f, measured by g."""
    from rich.console import Console

    from fdpg_fast.progress import show_table
    from fdpg_fast.sweep_report import cross_table

    show_table(Console(), "divergence to the target (* lowest)", *cross_table(measured))


# Their keys are the config's: another parser reads them.
WITH_KEYS = {"train": train, "sweep": sweep}


if __name__ == "__main__":
    sys.exit(main())
