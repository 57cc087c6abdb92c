"""Whole runs on real language models: the samples end up distributed as the target says.

Truth here is importance sampling from the base, which knows nothing of training: what p says of a
feature and how far p is from a, both with standard errors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fdpg_fast.config import Config
from fdpg_fast.progress import SilentDisplay
from fdpg_fast.trainer import Trainer

pytestmark = pytest.mark.slow

# A model of 260 thousand parameters takes, and needs, ten times the step of one of 3 million.
MODELS = pytest.mark.parametrize(
    ("model", "learning_rate"), [("stories_3m", 3e-5), ("stories_260k", 3e-4)]
)


def run_recipe(
    recipe: str, model: Path, out: Path, steps: int, **settings: Any
) -> tuple[Trainer, list[dict[str, Any]]]:
    # A GPU would choose bf16, of which no gap of 1e-4 nats can be asked.
    config = Config.read(recipe, ["--model.name", str(model), "--model.compute", "fp32"])
    config = config.replace(steps=steps, evaluation_samples=0, table_every=0, **settings)
    trainer = Trainer.from_config(config, out=out, display=SilentDisplay())
    trainer.train()
    assert trainer.run is not None
    return trainer, trainer.run.read("metrics.jsonl")


def late(records: list[dict[str, Any]], name: str, count: int) -> float:
    """Mean over the last steps: a single step of 256 samples is uncertain by 3 points."""
    return sum(record[name] for record in records[-count:]) / count


@MODELS
def test_every_story_gets_a_dog(
    model: str, learning_rate: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(model)
    trainer, records = run_recipe("dog", path, tmp_path, steps=16, learning_rate=learning_rate)
    dogs = [record["moment: contains 'dog'"] for record in records]
    assert dogs[0] < 0.08
    assert late(records, "moment: contains 'dog'", 4) > 0.6
    # Not by leaving the language behind: p itself is -log Z from the base.
    assert late(records, "kl_to_base", 4) < 2.5 * -records[-1]["log_z"]
    assert all(record["gap_mean"] < 1e-4 for record in records)
    _assert_loads_in_transformers(trainer)


@pytest.mark.parametrize(("model", "learning_rate"), [("stories_3m", 5e-6), ("stories_260k", 3e-5)])
def test_half_of_the_stories_get_a_female_word(
    model: str, learning_rate: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Within 3 points, as far as the samples tell that it is measured on and was fitted on.

    It ends low: what is learnt first is to write such words more often, and only then to write them
    where there are none yet.
    """
    path = request.getfixturevalue(model)
    trainer, _ = run_recipe("half_female", path, tmp_path, steps=20, learning_rate=learning_rate)
    measured = trainer.evaluate(2048)
    feature = "moment: a female word"
    before, _ = measured["base"][feature]
    share, error = measured["tuned"][feature]
    fitted = 0.5 / trainer.config.target.fit_samples**0.5  # error of the moment that p itself has
    assert abs(before - 0.5) > 3 * error
    assert abs(share - 0.5) < 0.03 + 2 * math.hypot(error, fitted)
    # And not by moving something else: by every divergence p is nearer than it was.
    for divergence in ("kl", "reverse_kl", "tv", "js"):
        assert measured["tuned"][divergence][0] < 0.9 * measured["base"][divergence][0]


@MODELS
def test_a_reward_rises_at_the_kl_that_its_beta_implies(
    model: str, learning_rate: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(model)
    trainer, _ = run_recipe("cheerful", path, tmp_path, steps=24, learning_rate=learning_rate)
    measured = trainer.evaluate(1024)
    base, tuned, target = (measured[name] for name in ("base", "tuned", "target"))
    reward = "moment: cheerful words"
    assert tuned[reward][0] > base[reward][0] + 0.5 * (target[reward][0] - base[reward][0])
    assert tuned["kl_to_base"][0] < 1.5 * target["kl_to_base"][0]


def _assert_loads_in_transformers(trainer: Trainer) -> None:
    assert trainer.run is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(trainer.run.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trainer.run.model)
    text = tokenizer("Once upon a time there was a dog", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = torch.log_softmax(model(text).logits, -1)
        ours = torch.log_softmax(trainer.policy.model(text.to(trainer.policy.device)).logits, -1)
    # The same weights in another order of sums: what fp32 promises is 1e-4 nats per token.
    assert float((theirs - ours.cpu()).abs().max()) < 1e-4
