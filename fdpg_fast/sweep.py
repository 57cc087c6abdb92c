"""The paper's experiment as one command: several divergences, several seeds, one table.

Every (divergence, seed) is a run of its own in ``OUT/<divergence>/<seed>``, which all commands for
runs read. Seeds come in the outer loop, so that a sweep that is stopped early has whole rows. All
runs share one base and one target: moments are fitted once, by the first run.

Then base and tuned models are measured alike: as many fresh samples of each, drawn with the same
random numbers, and divergences and log Z on the samples of all of them together
(:mod:`fdpg_fast.pool`). What is measured is in ``measured.json``, and shown by ``report.html``,
``report.md`` and ``measured.csv``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from fdpg_fast import metrics, ops
from fdpg_fast.baselines import Baseline
from fdpg_fast.building import prompts_of, sampler_of, target_of, tuned_of
from fdpg_fast.config import Config, ConfigError, to_yaml
from fdpg_fast.divergences import Divergence
from fdpg_fast.evaluation import draw_pool, measure_model, measured_for, texts_of, with_errors
from fdpg_fast.pool import Pool
from fdpg_fast.progress import for_this_terminal, seconds_of
from fdpg_fast.report import write_card, write_report
from fdpg_fast.rollout import Rollout
from fdpg_fast.run_directory import RunDirectory, RunDirectoryError
from fdpg_fast.sweep_report import write_sweep_report
from fdpg_fast.targets import Target
from fdpg_fast.trainer import Trainer, require_trainable

__all__ = ["Sweep"]


class Sweep:
    """Runs of one config that differ in divergence and seed.

    Args:
        config: of all runs. Its divergence does not count; its seed is the first one, and its
            ``evaluation_samples`` are the fresh samples of each model.
        out: folder; what is there of the same sweep is kept, and gone on with.
        divergences: names such as ``"js"`` or ``"alpha(0.5)"``; by default the paper's four,
            without those that are infinite on the target.
        seeds: how many.

    Raises:
        ConfigError: a divergence that cannot be, or cannot with the baseline or on the target.
        RunDirectoryError: the folder holds something else, or runs with other settings.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path,
        *,
        divergences: Sequence[str] = (),
        seeds: int = 1,
    ) -> None:
        self.config = config
        self.seeds = range(config.run.seed, config.run.seed + seeds)
        self.folder = RunDirectory(out)  # for its way of writing files; it is not a run
        self.target = target_of(config, partial(self._lay_out, _parsed(divergences)))

    @property
    def plan(self) -> Path:
        """What is swept: sweep.yaml."""
        return self.folder.path / "sweep.yaml"

    @property
    def measured(self) -> Path:
        """What came out: measured.json."""
        return self.folder.path / "measured.json"

    @staticmethod
    def read_plan(out: str | Path) -> dict[str, Any]:
        """``config``, ``divergences`` and ``seeds`` of the sweep in a folder, plain types.

        Raises:
            RunDirectoryError: there is none.
        """
        path = Path(out) / "sweep.yaml"
        try:
            plan: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise RunDirectoryError(
                f"sweep: {out} expected the folder of a sweep, found no sweep.yaml to go on with. "
                "Way out: name a recipe or a YAML file"
            ) from error
        return plan

    def run(self) -> dict[str, Any]:
        """Trains what is not trained yet, measures all, and writes the reports.

        Ctrl-C saves the run that is in training; the same call goes on with it.

        Returns:
            What measured.json holds.
        """
        self._write_plan()
        trained = self.train()
        measured = self.folder.read_json(self.measured)
        if trained or measured is None or measured["plan"] != self._plan():
            measured = self.measure()
        write_sweep_report(self.folder, measured, self.runs)
        return measured

    def train(self) -> int:
        """Trains the runs that are not finished; says how many those were."""
        for run in self.runs.values():  # the moments that an earlier call has fitted
            if self.target.needs_fit and not run.never_began():
                self.target.load_state_dict(run.read_facts().get("lambdas", {}))
        waiting = {key: run for key, run in self.runs.items() if not run.has_model}
        for number, (key, run) in enumerate(waiting.items(), start=1):
            display = for_this_terminal()
            display.note(f"run {number} of {len(waiting)}: {key[0]}, seed {key[1]}")
            trainer = Trainer(
                self.target, config=self._config(*key), out=run.path, resume=True, display=display
            )
            try:
                trainer.train()
            except (KeyboardInterrupt, SystemExit):
                display.note(f"or with the whole sweep: fdpg sweep --out {self.folder.path}")
                raise
        return len(waiting)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Measures base and tuned models on fresh samples, and writes measured.json.

        Every run also gets its evaluation.json, card and report, of the same numbers.
        """
        base = self.target.base.model
        pool = draw_pool(
            # Adapters are put on the weights of the base, which are loaded once.
            [partial(tuned_of, self.config, run.model, base) for run in self.runs.values()],
            self.target,
            prompts_of(self.config, base),
            sampler_of(self.config),
            samples=self.config.samples_to_measure,
            seed=self.config.run.seed,
            note=for_this_terminal().note,
        )
        columns = measured_for(*self.divergences)
        of_models = [
            measure_model(pool, number, self.target, columns)
            for number in range(1 + len(self.runs))
        ]
        runs: dict[str, dict[str, Any]] = {}
        for at, ((divergence, seed), run) in enumerate(self.runs.items(), start=1):
            runs.setdefault(divergence, {})[str(seed)] = {
                **of_models[at],
                "reward_std": [_reward_std(pool, at, divergence), None],
                "seconds": [sum(map(seconds_of, run.read("timing.jsonl"))), None],
            }
        measured = {
            "plan": self._plan(),
            "samples": len(pool.rollouts[0]),
            "models": 1 + len(self.runs),
            "columns": [str(f) for f in columns],
            "goals": self.target.moments,
            "target": with_errors(pool.target()),
            "base": of_models[0],
            "runs": runs,
            # Of the first seed, whose runs come first.
            "texts": texts_of(
                dict(zip(["base", *map(str, self.divergences)], pool.rollouts, strict=False))
            ),
        }
        self._tell_runs(measured, pool.rollouts)
        self.folder.write_json(self.measured, measured)
        return measured

    # --------------------------------------------------------------------------------------------

    def _lay_out(self, asked: Sequence[Divergence], target: Target) -> None:
        """Which runs there are; refuses what can be refused before a model is loaded."""
        self.divergences = _finite(asked, target)
        self.runs = {
            (str(f), seed): RunDirectory(self.folder.path / _folder_name(f) / str(seed))
            for seed in self.seeds
            for f in self.divergences
        }
        for f in self.divergences:
            require_trainable(self._config(str(f), self.config.run.seed), target)
        self._require_own_folder()
        self._require_same_settings()

    def _config(self, divergence: str, seed: int) -> Config:
        # Comparing it with the base is not the run's own job here: that is done for all at once.
        return self.config.replace(divergence=divergence, seed=seed, evaluation_samples=0)

    def _plan(self) -> str:
        plan = {
            "divergences": [str(f) for f in self.divergences],
            "seeds": len(self.seeds),
            "config": yaml.safe_load(self.config.located().dump()),
        }
        return to_yaml(plan)

    def _write_plan(self) -> None:
        self.folder.require_writable()
        self.folder.write_text(self.plan, self._plan())

    def _require_own_folder(self) -> None:
        path = self.folder.path
        if path.is_dir() and any(path.iterdir()) and not self.plan.is_file():
            raise RunDirectoryError(
                f"sweep: {path} holds files of something else. Way out: another --out"
            )

    def _require_same_settings(self) -> None:
        """What is there already must be of this sweep, all of it, before any of it goes on."""
        for key, run in self.runs.items():
            if run.never_began():
                continue
            other = self._config(*key).difference(RunDirectory.open(run.path).config())
            if other:
                raise RunDirectoryError(
                    f"sweep: {run.path} was started with another {', '.join(other)}. Way out: the "
                    "same settings (without a recipe, `fdpg sweep --out` takes them from the "
                    "folder), or another --out"
                )

    def _tell_runs(self, measured: Mapping[str, Any], rollouts: Sequence[Rollout]) -> None:
        for rollout, (key, run) in zip(rollouts[1:], self.runs.items(), strict=True):
            evaluation = {
                "samples": measured["samples"],
                "seed": self.config.run.seed,
                "goals": measured["goals"],
                "divergence": key[0],
                "target": measured["target"],
                "base": measured["base"],
                "tuned": measured["runs"][key[0]][str(key[1])],
                "texts": texts_of({"base": rollouts[0], "tuned": rollout}),
            }
            run.write_json(run.evaluation, evaluation)
            write_card(run)
            write_report([run], run.report)


# ------------------------------------------------------------------------------------------------


def _parsed(names: Sequence[str]) -> tuple[Divergence, ...]:
    try:
        parsed = tuple(Divergence.parse(name) for name in names)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if again := [f for at, f in enumerate(parsed) if f in parsed[:at]]:
        raise ConfigError(
            f"sweep: `divergences` expected each once, got {again[0]} again. Way out: for more "
            "runs of each, --seeds"
        )
    return parsed


def _finite(asked: Sequence[Divergence], target: Target) -> tuple[Divergence, ...]:
    """Those asked for, if all are finite on the target; or those of the paper's four that are."""
    finite = tuple(
        f for f in asked or metrics.PAPER if f.allows_zero_targets or not target.can_be_zero
    )
    if not asked or len(finite) == len(asked):
        return finite
    infinite = ", ".join(str(f) for f in asked if f not in finite)
    without = (
        f"leave it out (--divergences {','.join(map(str, finite))}): all models are measured by "
        "reverse_kl all the same; or "
        if finite
        else ""
    )
    raise ConfigError(
        f"sweep: {infinite} cannot be minimised: it is infinite wherever the target is zero, and "
        f"{target} is zero for samples that break a constraint. Ways out: {without}smooth the "
        "target (--target.smooth 1e-6)"
    )


def _folder_name(divergence: Divergence) -> str:
    """``js``, ``alpha-0.5``: no brackets, which shells want quoted."""
    return str(divergence).replace("(", "-").replace(")", "")


def _reward_std(pool: Pool, number: int, divergence: str) -> float:
    """How far pseudo-rewards spread over a model's own samples."""
    rollout = pool.rollouts[number]
    statistics = ops.fdiv_weights(
        rollout.log_q,
        rollout.log_q,
        pool.of_rollouts[number].log_score,
        pool.log_z,
        rollout.prompt_index,
        divergence=Divergence.parse(divergence),
        baseline=Baseline.parse("none"),
    ).statistics
    return statistics[ops.STATISTICS.index("reward_std")].item()
