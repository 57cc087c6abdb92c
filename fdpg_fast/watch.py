"""Looks for runs that go wrong while every number is still finite, and says so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from fdpg_fast import metrics

__all__ = ["Watch"]


class Watch:
    """Looks at every step's record, in order; ``steps`` is how many the run has."""

    PATIENCE = 5  # steps in a row: one step's estimate may be far off
    REPEAT = 25

    def __init__(self, steps: int) -> None:
        soon = min(self.PATIENCE, steps)  # what is no estimate
        self._patience = {"empty": soon, "alike": soon}
        self._target_kl = math.nan
        self._count: dict[str, int] = {}
        self._said: dict[str, int] = {}

    def look(self, record: Mapping[str, float]) -> Iterator[str]:
        """Warnings that this step gives reason for, each every 25 steps at most."""
        # A policy far from the target has no samples to tell where that is: the last that had.
        if math.isfinite(record["kl_target_base"]):
            self._target_kl = record["kl_target_base"]
        lost = metrics.runaway({**record, "kl_target_base": self._target_kl})
        reasons = {
            "runaway": lost,
            "implausible": metrics.implausible(record),
            "empty": None if lost else _nothing_to_learn(record),
            "alike": _all_alike(record),
        }
        step = int(record["step"])
        for name, reason in reasons.items():
            self._count[name] = self._count.get(name, 0) + 1 if reason else 0
            due = step - self._said.get(name, -self.REPEAT) >= self.REPEAT
            patience = self._patience.get(name, self.PATIENCE)
            if reason and due and self._count[name] >= patience:
                self._said[name] = step
                yield f"step {step}: {reason}"


def _nothing_to_learn(record: Mapping[str, float]) -> str | None:
    if record["n_used"] > record["n_off_support"]:
        return None
    return (
        "no sample was possible under the target, in this step and those before, so there is "
        "nothing to learn from. Way out: more samples per step, prompts that lead to such texts, a "
        "likelier constraint, or a reward in its place"
    )


def _all_alike(record: Mapping[str, float]) -> str | None:
    if record["weight_abs_max"] > 1e-9 or not record["n_used"] > record["n_off_support"]:
        return None
    return (
        "every sample had weight 0, in this step and those before, so nothing was learnt. Likely "
        "cause: each prompt's Z rests on one sample so far, which is then just as likely as it "
        "shall be. Way out: more sampling.samples_per_prompt, or objective.log_z: frozen"
    )
