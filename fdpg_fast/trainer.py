"""Moves a policy onto a target distribution by f-divergence policy gradient.

The algorithm is f-DPG (Go et al., arXiv 2302.08215, Algorithm 1). One step, in its words:

    x_i ~ q                                      q is the policy itself, unless it is asked to lag
    log P(x_i) = log a(x_i) + ...                the target, unnormalised
    Z <- mean of P/q over all samples so far     per prompt
    r_i = -f'(pi(x_i) Z / P(x_i))                pseudo-reward, detached
    w_i = (pi/q)(x_i) (r_i - baseline)           what each sample is worth
    theta <- theta + AdamW( mean_i w_i grad log pi(x_i) )

On policy, log pi is log q: what the sampler recorded when it drew the sample, so weights are known
before the only training forward; that forward then measures how far the two disagree (the gap), and
a run whose gap is too large stops, because every weight is an exponential of such a difference.
With ``behaviour: rescore`` log q is another forward pass of the trainer's, and no gap enters.

Legend: B samples of a step, G prompts, S sampled tokens.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdpg_fast import checkpoint, metrics, ops
from fdpg_fast.baselines import Baseline
from fdpg_fast.building import (
    describes,
    policy_of,
    prompts_of,
    require_possible,
    sampler_of,
    target_of,
)
from fdpg_fast.checkpoint import Checkpoint, CheckpointError
from fdpg_fast.config import Config, ConfigError, TargetConfig
from fdpg_fast.divergences import Divergence, require_finite_at_zero_targets
from fdpg_fast.environment import device_name, versions
from fdpg_fast.evaluation import evaluate
from fdpg_fast.interruption import Interruption
from fdpg_fast.models import LanguageModel
from fdpg_fast.partition import Partition
from fdpg_fast.progress import Display, for_this_terminal, one_line
from fdpg_fast.prompts import as_setting
from fdpg_fast.report import write_card, write_report
from fdpg_fast.rollout import PromptBatch, Rollout
from fdpg_fast.run_directory import RunDirectory
from fdpg_fast.sampler import LogitsError, SamplingError
from fdpg_fast.scorers import ScorerError
from fdpg_fast.targets import Scores, Target, TargetError
from fdpg_fast.watch import Watch

__all__ = ["Trainer", "TrainingError", "require_trainable"]

# Streams of random numbers, so that no two uses share any (ops.random_key).
TRAINING, FIT, HOLDOUT, NORMALISER = range(4)

# Largest mean disagreement of sampler and trainer, in nats per token.
MAX_GAP = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
LEAST_FITTED = 4  # samples of each prompt in a fit, however many prompts: 2 are too few to unbias
GAP_SAMPLES = 32  # samples of a lagging proposal that are scored again to measure it


class TrainingError(RuntimeError):
    """A run that must not go on: a value that is not finite, or log-probs that disagree."""


class Trainer:
    """One run.

    Args:
        target: what the samples should be like; its base is also where the policy starts.
        divergence: what is minimised: a name such as ``"js"`` or ``"alpha(0.5)"``, or a
            :class:`Divergence`. ``fdpg train --help`` lists them.
        prompts: a text, texts, or a .txt or .jsonl file; empty: none.
        out: folder of the run; None: nothing is written.
        resume: go on with the run in ``out`` from its newest checkpoint, if any.
        display: who is told how it goes; by default a live panel or plain lines.
        stop: ends samples early: given the text sampled so far, is it whole? ``FILE.py:FUNCTION``
            is a setting like others. A Python function the run's folder cannot hold: give it again
            to go on; ``fdpg sample`` and ``fdpg evaluate`` will refuse, and say the way out.
        config: every setting at once; a keyword goes before what it says.
        settings: any key of :class:`Config` without its part: ``steps=100, learning_rate=1e-5``.

    Raises:
        ConfigError: a setting that cannot be, or a divergence that is infinite on this target.
        TargetError: ``target`` is none, or the base itself.
        RunDirectoryError: ``out`` cannot be used.

    Example::

        base = fdpg.load("gpt2")
        target = base.constrain({fdpg.contains("amazing"): 1.0})
        trainer = fdpg.Trainer(target, divergence="js", prompts="Once", out="runs/amazing")
        trainer.train()
    """

    def __init__(
        self,
        target: Target,
        *,
        divergence: str | Divergence | None = None,
        prompts: str | os.PathLike[str] | Sequence[str] | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        display: Display | None = None,
        stop: str | Callable[[str], bool] | None = None,
        config: Config | None = None,
        **settings: Any,
    ) -> None:
        _require_target(target)
        self.target = target
        self.base = target.base.model
        self.config = _configured(config, target, divergence, prompts, stop, settings)
        objective, sampling = self.config.objective, self.config.sampling
        self.divergence, self.baseline = _objective(self.config, target, divergence)

        self.display: Display = display or for_this_terminal()
        self.prompts = prompts_of(self.config, self.base)
        self.sampler = sampler_of(self.config, stop=stop if callable(stop) else None)
        self.policy = policy_of(self.config, self.base)
        # The proposal q: the policy itself, or a copy that lags behind it.
        self.proposal = self.policy.frozen_copy() if sampling.adaptive_proposal else self.policy
        self.partition = Partition(len(self.prompts), objective.log_z, self.policy.device)
        self.baseline_state = self.baseline.new_state(self.policy.device)
        self.parameters = self.policy.named_parameters()
        optimiser = self.config.optimiser
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            lr=optimiser.learning_rate,
            betas=optimiser.betas,
            eps=optimiser.epsilon,
            weight_decay=optimiser.weight_decay,
        )
        self.steps_done = 0
        self._saved = 0  # steps done at the newest checkpoint
        self._prepared = False
        self._pending: list[_Pending] = []
        self._watch = Watch(self.config.run.steps)

        self.run: RunDirectory | None = None
        if out is not None:
            self._open_run(out, resume)

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        display: Display | None = None,
    ) -> Trainer:
        """A run from its config alone: loads the model and builds the target as well."""
        if out is not None and _goes_on(out, resume):
            RunDirectory.open(out).require_same(config)
        elif out is not None:
            RunDirectory(out).require_free()

        target = target_of(config, partial(require_trainable, config))
        return cls(target, config=config, out=out, resume=resume, display=display)

    # ---- the walk ---------------------------------------------------------------------------

    def train(self) -> dict[str, Any] | None:
        """Trains to the last step, saves the model, and compares it with the base.

        Ctrl-C and SIGTERM save a checkpoint first, and then raise KeyboardInterrupt or SystemExit.

        Returns:
            What evaluation.json holds, or None with ``evaluation_samples=0``.

        Raises:
            TrainingError: a value was not finite, or sampler and trainer disagree about log-probs;
                the weights are those of the step before.
            SamplingError, ScorerError, TargetError: a function of the user misbehaved; the steps
                before are saved.
            LogitsError: the weights have diverged; they are not saved, so that no checkpoint from
                before makes room for them.
            RunDirectoryError: another process trains in the folder.
        """
        if self.run is None:
            return self._train()
        self.run.claim()
        try:
            return self._train()
        finally:
            self.run.release()

    def _train(self) -> dict[str, Any] | None:
        config = self.config.run
        self.prepare()  # may be left at any time, as nothing is lost
        with Interruption(self.display.note) as interruption:
            self.display.start(
                self.header(),
                steps=config.steps,
                done=self.steps_done,
                divergence=str(self.divergence),
                goals=self.target.moments,
            )
            try:
                while self.steps_done < config.steps and interruption.signal is None:
                    self.step()
                    if self.steps_done % config.log_every == 0:
                        self._flush()
                    if self.steps_done % config.checkpoint_every == 0:
                        self.save_checkpoint()
                self._save_if_behind()
            except LogitsError:
                raise
            except (SamplingError, ScorerError, TargetError):
                self._save_if_behind()  # drawing and scoring come before anything changes
                raise
            finally:
                self._flush()
                self.display.stop()
            if interruption.signal is not None:
                self._leave(interruption.signal)
        return self._finish()

    def step(self) -> None:
        """One batch of samples, and the optimiser's steps on it."""
        self.prepare()
        clock = _Clock(self.policy.device)
        rollout = self.draw(self.proposal, self.prompts.batch(self.steps_done), TRAINING)
        clock.lap("sample")
        if self.config.objective.behaviour == "rescore":
            rollout = dataclasses.replace(rollout, log_q=self.proposal.sequence_logprob(rollout))
        scores = self.target.score(rollout)
        log_z = self.partition.update(rollout, scores.log_score)
        clock.lap("score")
        earlier = None if self.baseline_state is None else self.baseline_state.clone()
        update = self._update(rollout, scores, log_z, self.baseline_state)
        for _ in range(1, self.config.objective.steps_per_batch):
            # A batch enters the average once, and never the baseline of its own samples.
            state = None if earlier is None else earlier.clone()
            self._update(rollout, scores, log_z, state, again=True)
        self._refresh_proposal(rollout, scores, log_z, update)
        clock.lap("train")
        self.steps_done += 1
        self._record(rollout, scores, log_z, update, clock)

    def draw(
        self, model: LanguageModel, prompts: PromptBatch, stream: int, samples_per_prompt: int = 0
    ) -> Rollout:
        """Samples of ``model``, a function of (seed, stream, steps done) alone."""
        key = ops.random_key(self.config.run.seed, self.steps_done, stream)
        return self.sampler.draw(
            model, prompts, samples_per_prompt or self.config.sampling.samples_per_prompt, key
        )

    def _update(
        self,
        rollout: Rollout,
        scores: Scores,
        log_z: Tensor,
        baseline_state: Tensor | None,
        again: bool = False,
    ) -> _Update:
        """One optimiser step on a batch; ``again``: not the first on it."""
        # On policy, pi is q: what the policy thinks of its samples is known.
        on_policy = self.proposal is self.policy and not again
        log_pi = rollout.log_q if on_policy else self.policy.sequence_logprob(rollout)
        objective = self.config.objective
        weights, statistics = ops.fdiv_weights(
            log_pi,
            rollout.log_q,
            scores.log_score,
            log_z,
            rollout.prompt_index,
            divergence=self.divergence,
            baseline=self.baseline,
            baseline_state=baseline_state,
            ratio_clip=objective.ratio_clip,
            reward_clip=objective.reward_clip,
        )
        self._require_finite_weights(rollout, scores, log_pi, weights)
        self.optimiser.zero_grad()  # of a step before that ended in an error, out of memory say
        token_logprob = self.policy.accumulate_gradient(
            rollout,
            weights,
            denominator=len(rollout),
            micro_batch=self.config.optimiser.micro_batch,
        )
        gap = self._gap(rollout, token_logprob, on_policy) if not again else None
        grad_norm = self._require_sound_gradient(rollout, gap)
        self._move(grad_norm)
        return _Update(log_pi, weights, statistics, gap, grad_norm)

    def _move(self, grad_norm: Tensor) -> None:
        """Clips, sets the learning rate of this step, and moves the weights."""
        limit = self.config.optimiser.max_grad_norm
        if math.isfinite(limit):
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.steps_done)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def learning_rate(self, step: int) -> float:
        """A function of the step alone (0 is the first), so that a resumed run continues it."""
        config = self.config.optimiser
        rate, steps = config.learning_rate, self.config.run.steps
        if step < config.warmup_steps:
            return rate * (step + 1) / config.warmup_steps
        left = 1 - (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        left = max(0.0, left)  # whoever steps on after the last one
        if config.schedule == "linear":
            return rate * left
        if config.schedule == "cosine":
            return rate * (1 - math.cos(math.pi * left)) / 2
        return rate

    def _refresh_proposal(
        self, rollout: Rollout, scores: Scores, log_z: Tensor, update: _Update
    ) -> None:
        """q <- pi if pi is closer to p, as samples of q tell that pi was not yet trained on.

        KL-adaptive DPG (arXiv 2012.11635, Algorithm 1). By KL(p || .) whatever the run minimises:
        it is an expectation under p, which q covers, while mass of pi where q has no samples
        would go unseen.
        """
        if self.proposal is self.policy:
            return
        if (self.steps_done + 1) % self.config.sampling.proposal_every:
            return

        # KL(p || q) - KL(p || pi), by nothing but samples that p allows: the control variate of
        # `fdiv_terms` would take mass of pi that q did not see for a gain. NaN where Z is unknown.
        ratio = (scores.log_score - rollout.log_q - log_z[rollout.prompt_index]).exp()
        gain = (update.log_pi - rollout.log_q).where(ratio != 0, 0.0)
        if bool((ratio * gain).nanmean() > 0):
            self.proposal.copy_weights_from(self.policy)

    # ---- what must hold before weights change -------------------------------------------------

    def _gap(
        self, rollout: Rollout, token_logprob: Tensor, on_policy: bool
    ) -> Mapping[str, Tensor]:
        """How far trainer and sampler disagree about the log-probs of the same tokens."""
        if not on_policy:  # then pi is not q, and q is asked itself, about a few samples
            rollout = rollout.select(torch.tensor(rollout.spread(GAP_SAMPLES)))
            token_logprob = self.proposal.token_logprob(rollout)
        return metrics.logprob_gap(token_logprob, rollout)

    def _require_finite_weights(
        self, rollout: Rollout, scores: Scores, log_pi: Tensor, weights: Tensor
    ) -> None:
        wrong = (~weights.isfinite()).nonzero().flatten().tolist()
        if wrong:
            first = wrong[0]
            raise TrainingError(
                f"step {self.steps_done + 1}: `weights` expected finite numbers, got "
                f"{weights[first].item()} for {_samples(wrong)}. The first has log P "
                f"{scores.log_score[first].item():.4g}, log pi {log_pi[first].item():.4g}, text "
                f"{one_line(rollout.texts[first], 80)!r}. The model is as it was before this step. "
                "Way out: objective.reward_clip, another divergence, or a look at the target"
            )

    def _require_sound_gradient(self, rollout: Rollout, gap: Mapping[str, Tensor] | None) -> Tensor:
        """The gradient's norm, if it is finite and the log-probs it came from can be trusted."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients).to(self.policy.device)
        # The one question a step asks of the device: whether the weights may change.
        disagreement = grad_norm.new_zeros(()) if gap is None else gap["gap_mean"]
        norm, mean_gap = torch.stack([grad_norm.double(), disagreement.double()]).tolist()
        limit = self.config.run.max_gap or MAX_GAP[self.policy.compute]
        if math.isfinite(norm) and not mean_gap > limit:
            return grad_norm
        wrong = [
            name
            for name, p in self.parameters.items()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        self.optimiser.zero_grad()
        if mean_gap > limit:
            raise TrainingError(
                f"step {self.steps_done + 1}: sampler and trainer disagree by {mean_gap:.2g} nats "
                f"per token on the same samples (limit {limit:g}): every weight would be wrong. "
                "The model is as it was before this step. Way out: --model.attention eager or "
                "--model.compute fp32; or raise run.max_gap"
            )
        raise TrainingError(
            f"step {self.steps_done + 1}: the gradient expected finite numbers, got {norm} in "
            f"{', '.join(wrong[:3]) or 'its norm'}{' and others' if len(wrong) > 3 else ''}, from "
            f"{len(rollout)} samples. The model is as it was before this step. Way out: "
            "objective.reward_clip, a lower learning rate, or --model.compute fp32"
        )

    # ---- before, beside and after the steps ---------------------------------------------------

    def prepare(self) -> None:
        """Fits what the target must have fitted on samples of the base; once, before any step."""
        if self._prepared:
            return
        prompts = self.prompts.all()
        if self.target.needs_fit:
            count = self.config.target.fit_samples
            each = max(LEAST_FITTED, -(-count // len(prompts)))
            self.display.note(
                f"fitting the moments on {each * len(prompts)} samples of the base ..."
            )
            fit = self.draw(self.base, prompts, FIT, each)
            report = self.target.fit(fit, self.draw(self.base, prompts, HOLDOUT, each))
            for problem in report.problems:
                self.display.warn(problem)
            self.display.note(str(dataclasses.replace(report, problems=())))
        elif self.target.fitted_prompts not in (None, frozenset(prompts.tokens)):
            self.display.warn(
                "the lambdas of this target were fitted on other prompts, for which its moments "
                "hold. Way out: build the target anew, or fit it on samples of these"
            )
        if self.config.objective.log_z == "frozen":
            count = self.config.objective.log_z_samples
            rollout = self.draw(self.base, prompts, NORMALISER, count)
            self.partition.freeze(rollout, self.target.log_score(rollout))
        self._prepared = True
        if self.run is not None:
            self.run.write_json(self.run.facts, self.facts())

    def header(self) -> dict[str, str]:
        """What a person should know before the first step."""
        config = self.config
        learning, held = (
            sum(p.numel() for p in parameters) / 1e6
            for parameters in (self.parameters.values(), self.policy.model.parameters())
        )
        weights = f"{held:.1f} M weights"
        if learning < held:
            weights = f"adapter of {learning:.2f} M weights on {held - learning:.1f} M"
        checks = {k: v for k, v in self.policy.checks.items() if k != "tolerance"}
        wanted = ", ".join(f"{name} = {goal:g}" for name, goal in self.target.moments.items())
        rows = {
            "model": f"{_model_name(self.base)}, {weights}, {self.policy.compute}",
            "device": device_name(self.policy.device),
            "attention": f"{self.policy.attention}; scoring {self.policy.scoring}",
            "checked": ", ".join(f"{name} to {error:.0e} nats" for name, error in checks.items()),
            "target": str(self.target) + (f"  ({wanted})" if wanted else ""),
            "divergence": f"{self.divergence}: {self.divergence.meaning}",
            "baseline": f"{self.baseline}: {self.baseline.meaning}",
            "prompts": f"{len(self.prompts)}, such as {one_line(self.prompts.texts[0], 60)!r}",
            "samples": f"{config.samples_per_step} a step, {config.sampling.max_new_tokens} tokens",
            "optimiser": f"AdamW, learning rate {config.optimiser.learning_rate:g}, "
            f"{config.optimiser.schedule}, warm-up {config.optimiser.warmup_steps}",
        }
        if self.run is not None:
            rows["written to"] = str(self.run.path)
        return rows

    def facts(self) -> dict[str, Any]:
        """What run.json holds: what the run is on and with, beyond its config."""
        return {
            "versions": versions(),
            "device": device_name(self.policy.device),
            "compute": self.policy.compute,
            "attention": self.policy.attention,
            "scoring": self.policy.scoring,
            "checks": self.policy.checks,
            "model": _model_name(self.base),
            "auto_class": self.policy.auto_class,
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "target": str(self.target),
            "goals": self.target.moments,
            "lambdas": self.target.state_dict(),
            "divergence": str(self.divergence),
            "baseline": str(self.baseline),
            "prompts": len(self.prompts),
        }

    def evaluate(self, samples: int | None = None) -> dict[str, Any]:
        """Measures base and policy on fresh samples, drawn with the same random numbers.

        Args:
            samples: of each, over all prompts; by default ``evaluation_samples``, or what that is
                by default.

        Returns:
            What evaluation.json holds.
        """
        self.prepare()
        return evaluate(
            self.policy,
            self.target,
            self.prompts,
            self.sampler,
            samples=samples or self.config.samples_to_measure,
            seed=self.config.run.seed,
            divergence=self.divergence,
        )

    def save_model(self) -> None:
        """Writes ``model/``, which transformers loads, with a card."""
        if self.run is None:
            return
        checkpoint.replace_directory(self.run.model, self.policy.save)
        write_card(self.run)

    def _finish(self) -> dict[str, Any] | None:
        if self.run is not None:
            self.save_model()  # first: measuring takes a while, and may be interrupted
        evaluation = None
        if count := self.config.run.evaluation_samples:
            self.display.note(f"measuring base and tuned model on {count} fresh samples each ...")
            evaluation = self.evaluate()
        if self.run is not None:
            if evaluation is not None:
                self.run.write_json(self.run.evaluation, evaluation)
                write_card(self.run)  # again: it now has the numbers
            write_report([self.run], self.run.report)
        files = {} if self.run is None else {"model": self.run.model, "report": self.run.report}
        self.display.finish(evaluation, files)
        return evaluation

    def _leave(self, received: signal.Signals) -> None:
        if self.run is not None and self.steps_done:
            self.display.note(f"saved after step {self.steps_done}. To go on: {self.run.way_on()}")
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received)

    # ---- records ----------------------------------------------------------------------------

    def _record(
        self, rollout: Rollout, scores: Scores, log_z: Tensor, update: _Update, clock: _Clock
    ) -> None:
        """Keeps a step's numbers on the device until the next look."""
        numbers = dict(zip(ops.STATISTICS, update.statistics.unbind(), strict=True))
        for name in ("divergence", "divergence_se"):  # where no sample tells of p: not known
            numbers[name] = numbers[name].where(numbers["target_ess"] > 0, math.nan)
        numbers |= metrics.measure(
            rollout, scores, update.log_pi, log_z, self.partition.standard_error
        )
        if update.gap is not None:
            numbers |= update.gap
        numbers["grad_norm"] = update.grad_norm
        stacked = torch.stack([value.double().to(log_z.device) for value in numbers.values()])
        step = self.steps_done
        facts = {
            "step": step,
            "samples": step * len(rollout),
            "learning_rate": self.learning_rate(step - 1),
        }
        timing = {"step": step, "samples": len(rollout), **clock.seconds}
        every = self.config.run.table_every
        rows = []
        if every and step % every == 0:
            rows = self._table(rollout, scores, update)
        self._pending.append(_Pending(facts, tuple(numbers), stacked, timing, rows))

    def _table(self, rollout: Rollout, scores: Scores, update: _Update) -> list[dict[str, Any]]:
        """Some samples of a step, each with how it was valued."""
        rows = rollout.spread(self.config.run.table_rows)
        columns = torch.stack(
            [scores.log_base, scores.log_score, update.log_pi, update.weights], dim=1
        )[rows].tolist()
        names, prompts = ("log_base", "log_score", "log_pi", "weight"), rollout.prompt_texts
        return [
            {
                "step": self.steps_done,
                "prompt": prompts[row],
                "text": rollout.texts[row],
                **dict(zip(names, values, strict=True)),
            }
            for row, values in zip(rows, columns, strict=True)
        ]

    def _flush(self) -> None:
        """Reads the numbers since the last look, all at once, and writes and shows them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        values = torch.stack([one.values for one in pending]).tolist()
        records = [
            {**one.facts, **dict(zip(one.names, row, strict=True))}
            for one, row in zip(pending, values, strict=True)
        ]
        if self.run is not None:
            self.run.evaluation.unlink(missing_ok=True)  # of the model before these steps
            self.run.append("metrics.jsonl", records)
            self.run.append("timing.jsonl", [one.timing for one in pending])
            self.run.append("samples.jsonl", [row for one in pending for row in one.rows])
        self.display.step(records[-1], pending[-1].timing)
        for one in pending:
            if one.rows:
                self.display.samples(one.facts["step"], one.rows)
        for record in records:
            for warning in self._watch.look(record):
                self.display.warn(warning)

    # ---- checkpoints ------------------------------------------------------------------------

    def save_checkpoint(self) -> Path | None:
        """Writes everything the next step depends on; None without a folder."""
        if self.run is None:
            return None
        tensors: dict[str, dict[str, Tensor]] = {
            "policy": dict(self.parameters),
            "optimiser": {
                f"{name}/{key}": value
                for name, parameter in self.parameters.items()
                for key, value in self.optimiser.state.get(parameter, {}).items()
            },
            "state": dict(self.partition.state_dict()),
        }
        if self.baseline_state is not None:
            tensors["state"]["baseline"] = self.baseline_state
        if self.proposal is not self.policy:
            tensors["proposal"] = dict(self.proposal.named_parameters())
        facts = {"seed": self.config.run.seed, "lambdas": self.target.state_dict()}
        self._flush()
        self.run.sync()
        path = checkpoint.save(
            self.run.checkpoints,
            Checkpoint(self.steps_done, tensors, facts),
            keep=self.config.run.keep_checkpoints,
        )
        self._saved = self.steps_done
        return path

    def _save_if_behind(self) -> None:
        if self._saved != self.steps_done:
            self.save_checkpoint()

    def load_checkpoint(self, path: Path) -> None:
        """Continues exactly where :meth:`save_checkpoint` was called.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        saved = checkpoint.load(path)
        _load_parameters(self.parameters, saved.tensors["policy"], path)
        if self.proposal is not self.policy:
            own = self.proposal.named_parameters()
            _load_parameters(own, saved.tensors.get("proposal", {}), path)
        self.optimiser.state.clear()
        for key, value in saved.tensors["optimiser"].items():
            name, _, kind = key.rpartition("/")
            parameter = self.parameters[name]
            # AdamW counts its steps on the CPU and keeps its averages beside the weights.
            kept = value if kind == "step" else value.to(parameter.device)
            self.optimiser.state[parameter][kind] = kept
        state = dict(saved.tensors["state"])
        if self.baseline_state is not None:
            self.baseline_state.copy_(state.pop("baseline"))
        self.partition.load_state_dict(state)
        self.target.load_state_dict(saved.facts["lambdas"])
        self.steps_done = self._saved = saved.step
        self._prepared = True

    def _open_run(self, out: str | Path, resume: bool) -> None:
        if not _goes_on(out, resume):
            self.run = RunDirectory.create(out, self.config)
            return
        planned = RunDirectory.open(out).config().run.steps
        self.run, newest = RunDirectory.resume(out, self.config)
        if newest is not None:
            self.load_checkpoint(newest)
        self.run.rewind(self.steps_done)
        steps, optimiser = self.config.run.steps, self.config.optimiser
        if steps != planned and optimiser.schedule != "constant":
            self.display.note(
                f"the learning rate goes on as in a run of {steps} steps from the start, not of "
                f"{planned}: at {self.learning_rate(self.steps_done):.2g}"
            )


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Update:
    """What one optimiser step knew; tensors on the device."""

    log_pi: Tensor  # (B,) fp64, before the step
    weights: Tensor  # (B,) fp64
    statistics: Tensor  # (len(ops.STATISTICS),)
    gap: Mapping[str, Tensor] | None
    grad_norm: Tensor


@dataclass(frozen=True)
class _Pending:
    """A step's record that has not been read from the device yet."""

    facts: dict[str, Any]
    names: tuple[str, ...]
    values: Tensor  # (len(names),) fp64
    timing: dict[str, Any]
    rows: list[dict[str, Any]]


class _Clock:
    """Seconds of each part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else a part pays for what the one before queued
        now = time.perf_counter()
        self.seconds[part] = round(now - self._last, 4)
        self._last = now


def _require_target(target: object) -> None:
    way_out = "base.constrain({scorer: 1.0}), where base is fdpg.load(...) or Base(model)"
    if not isinstance(target, Target):
        raise TargetError(
            f"Trainer: `target` expected a target, got {type(target).__name__}. Way out: {way_out}"
        )
    if target is target.base:
        raise TargetError(
            "Trainer: `target` expected something wanted of the samples, got the base itself, "
            f"where the policy starts. Way out: {way_out}"
        )


def _configured(
    config: Config | None,
    target: Target,
    divergence: str | Divergence | None,
    prompts: str | os.PathLike[str] | Sequence[str] | None,
    stop: str | Callable[[str], bool] | None,
    settings: dict[str, Any],
) -> Config:
    """The whole config of a run from what a caller of Trainer gave."""
    if divergence is not None:
        settings["divergence"] = str(divergence)
    if prompts is not None:
        settings["source"] = as_setting(prompts)
    if callable(stop):
        settings |= {"stop": None, "stop_in_python": getattr(stop, "__qualname__", repr(stop))}
    elif stop is not None:
        settings["stop"] = stop
    config, model = config or Config(), target.base.model
    if model.name != (config.model.name or "default") or config == Config():
        settings |= {"name": model.name, "device": str(model.device), "compute": model.compute}
        # What the base was loaded with, and what evaluates the run will load it with.
        for key in ("trust_remote_code", "activation_checkpointing", "eos_ids"):
            settings[key] = getattr(model, key)
    if not describes(config, target):  # nobody may take another for that of this run
        nothing = TargetConfig()
        settings |= {part: getattr(nothing, part) for part in config.target.spec()}
        settings["built_in_python"] = target.describe(fitted=False)  # it may be given again
    return config.replace(**settings) if settings else config


def _objective(
    config: Config, target: Target, given: str | Divergence | None = None
) -> tuple[Divergence, Baseline]:
    """What is minimised, and the baseline, if the target allows them."""
    text = config.objective.divergence
    try:
        divergence = given if isinstance(given, Divergence) else Divergence.parse(text)
        baseline = _parse_baseline(config.objective.baseline, config.sampling.samples_per_prompt)
        # Refused before anything is drawn: it could only end in infinities.
        baseline.require_valid_for(divergence)
        if target.can_be_zero:
            require_finite_at_zero_targets(divergence, str(target))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return divergence, baseline


def require_trainable(config: Config, target: Target) -> None:
    """Refuses what can be refused without the model, which may take minutes to load.

    Raises:
        ConfigError: the target does not allow the divergence, or that the baseline.
        AdapterError, PromptError: as the part itself would.
    """
    _objective(config, target)
    require_possible(config)


def _goes_on(out: str | Path, resume: bool) -> bool:
    return resume and not RunDirectory(out).never_began()


def _parse_baseline(text: str, samples_per_prompt: int) -> Baseline:
    if text == "auto":
        text = "loo" if samples_per_prompt > 1 else "ema(0.99)"
    return Baseline.parse(text)


def _load_parameters(
    own: Mapping[str, torch.nn.Parameter], saved: Mapping[str, Tensor], path: Path
) -> None:
    if own.keys() != saved.keys() or any(own[n].shape != saved[n].shape for n in own):
        raise CheckpointError(
            f"checkpoint: {path} expected weights of this model, got another model's. Way out: "
            "resume with the model the run was started with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _model_name(model: LanguageModel) -> str:
    return "the embedded story model" if model.name == "default" else model.name


def _samples(rows: Sequence[int]) -> str:
    listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"sample {listed}" if len(rows) == 1 else f"{len(rows)} samples ({listed})"
