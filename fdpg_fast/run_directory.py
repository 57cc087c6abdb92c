"""The folder of one run: what is written, where, and how it is found again.

config.yaml         every key, defaults written out, and local paths in full
run.json            what the run is on and with beyond that: versions, device, checks, lambdas
metrics.jsonl       one line per step; nothing in it depends on the clock, so two runs of one
                    config can be compared with `diff`
timing.jsonl        one line per step: seconds spent sampling, scoring, training
samples.jsonl       the tables of samples shown while training
checkpoints/        step-N/, complete or invisible
model/              the tuned model, as transformers loads it
evaluation.json     fresh samples of the base and of the tuned model, measured
report.html         plots and samples, one file
qrs.html            what quasi-rejection sampling from the model costs and gives
README.md           model card
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fdpg_fast.checkpoint import CheckpointError, latest, sync
from fdpg_fast.config import Config
from fdpg_fast.divergences import Divergence

__all__ = ["RunDirectory", "RunDirectoryError"]

LOGS = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")


class RunDirectoryError(CheckpointError):
    """A folder that a run cannot be started in, resumed from, or read from."""


class _Claim:
    """That no other process of this machine trains in a folder. It ends with this object, or with
    the process: a lock of the kernel's, where the file system has such."""

    def __init__(self, opened: int) -> None:
        self.opened = opened

    def close(self) -> None:
        if self.opened >= 0:
            os.close(self.opened)
        self.opened = -1

    __del__ = close

    @classmethod
    def of(cls, folder: Path) -> _Claim:
        try:
            claim = cls(os.open(folder, os.O_RDONLY))
        except OSError as error:
            raise RunDirectoryError(f"run: cannot open {folder}: {error.strerror}") from error
        found = os.fstat(claim.opened)
        # A second lock would shut out a process that has one, which may open its runs as often as
        # it likes, by any name.
        if (known := _claims.get((found.st_dev, found.st_ino))) is not None:
            return known
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(claim.opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunDirectoryError(
                    f"run: another process is training in {folder}. Way out: wait for its end or "
                    "stop it, or another --out"
                ) from None
        _claims[found.st_dev, found.st_ino] = claim
        return claim


_claims: weakref.WeakValueDictionary[tuple[int, int], _Claim] = weakref.WeakValueDictionary()


def _disclaim() -> None:
    """In a process that was forked: claims are its parent's, which they would outlive here."""
    for claim in list(_claims.values()):
        claim.close()
    _claims.clear()


os.register_at_fork(after_in_child=_disclaim)


class RunDirectory:
    """The files of one run, by name."""

    def __init__(self, path: str | Path) -> None:
        self._claim: _Claim | None = None
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.report = self.path / "report.html"
        self.curve = self.path / "qrs.html"
        self.card = self.path / "README.md"
        self.evaluation = self.path / "evaluation.json"
        self.facts = self.path / "run.json"

    @classmethod
    def create(cls, path: str | Path, config: Config) -> RunDirectory:
        """A new run in a folder that is empty or does not exist yet, or whose run never began.

        Raises:
            RunDirectoryError: the folder holds something already, cannot be written, or another
                process trains in it.
        """
        run = cls(path)
        run.require_free()
        run.require_writable()
        run.claim()
        run.write_text(run.path / "config.yaml", config.located().dump())
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The folder of a run that was started earlier.

        Raises:
            RunDirectoryError: there is no run in it.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise RunDirectoryError(f"run: no folder {run.path}")
        config = run.path / "config.yaml"
        if not config.is_file():
            raise RunDirectoryError(
                f"run: {run.path} expected the folder of a run, found no config.yaml in it"
            )
        if not run._is_run():
            raise RunDirectoryError(
                f"run: {config} expected the settings of a run, got something else: it is damaged, "
                "or of another program. Way out: mend it, or start a new run in another --out"
            )
        return run

    @classmethod
    def resume(cls, path: str | Path, config: Config | None) -> tuple[RunDirectory, Path | None]:
        """A run to go on with: its folder and its newest complete checkpoint.

        ``config`` may differ from the saved one in the part ``run`` only (more steps, say; not
        another seed), and in where the files it names lie, which is then what the folder says too.

        Raises:
            RunDirectoryError: no run there, it cannot be written, another process trains in it, or
                ``config`` is another run's or has fewer steps than are done.
        """
        run = cls.open(path)
        run.require_writable()
        run.claim()
        if config is not None:
            run.require_same(config)
            run.write_text(run.path / "config.yaml", config.located().dump())
        return run, latest(run.checkpoints)

    def claim(self) -> None:
        """Raises RunDirectoryError if another process trains here; none can before a release."""
        self._claim = _Claim.of(self.path)

    def release(self) -> None:
        """Lets other processes go on with the run."""
        self._claim = None

    def require_free(self) -> None:
        """Raises RunDirectoryError where a new run would write over something."""
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"run: {self.path} expected a folder, got a file")
        if not self.never_began():
            if self._is_run():
                raise RunDirectoryError(
                    f"run: {self.path} holds a run already. Way out: --resume to go on with it, or "
                    "another --out"
                )
            raise RunDirectoryError(
                f"run: {self.path} holds files of something else. Way out: another --out"
            )

    def require_same(self, config: Config) -> None:
        """Raises RunDirectoryError if ``config`` is not what the run in the folder can go on by."""
        changed = config.difference(self.config())
        other = [key for key in changed if not key.startswith("run.") or key == "run.seed"]
        if other:
            raise RunDirectoryError(
                f"run: {self.path} was started with another {', '.join(other)}. Way out: "
                "resume with the same settings, or start a new run in another --out"
            )
        newest = latest(self.checkpoints)
        done = 0 if newest is None else int(newest.name.removeprefix("step-"))
        if config.run.steps < done:
            raise RunDirectoryError(
                f"run: `run.steps` expected at least {done}, the steps that {self.path} has "
                f"done, got {config.run.steps}. Way out: as many or more to go on, or another "
                "--out"
            )

    def never_began(self) -> bool:
        """Whether nothing is there, or only what a run writes before it records a step."""
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if not names <= {"config.yaml", "run.json"}:
            return False
        if not self._is_run():
            return not names
        # A config.yaml of the user's own is as no run writes it, and is kept.
        return (self.path / "config.yaml").read_text(encoding="utf-8") == self.config().dump()

    def config(self) -> Config:
        """The config the run was started with."""
        return Config.read(self.path / "config.yaml")

    def way_on(self) -> str:
        """What resumes the run: a command, or Python where its config alone cannot."""
        config = self.config()
        in_python = config.target.built_in_python or config.sampling.stop_in_python
        if in_python or self.minimised() is None:
            return f"in Python, Trainer(..., out={str(self.path)!r}, resume=True)"
        return f"fdpg train --resume --out {self.path}"

    def minimised(self) -> Divergence | None:
        """The run's divergence; None for a custom one, whose name is all that the config has."""
        try:
            return Divergence.parse(self.config().objective.divergence)
        except ValueError:
            return None

    def read_facts(self) -> dict[str, Any]:
        """What run.json holds; nothing for a run that never got to its first step."""
        return self.read_json(self.facts) or {}

    @property
    def has_model(self) -> bool:
        """Whether training got to its end, which is when the model, or its adapter, is written."""
        files = ("config.json", "adapter_config.json")
        return any((self.model / file).is_file() for file in files)

    def require_model(self) -> None:
        """Raises RunDirectoryError if there is no finished model."""
        if not self.has_model:
            raise RunDirectoryError(
                f"run: {self.path} has no model/ yet: the run did not get to its end. Way out: "
                f"{self.way_on()}"
            )

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """A JSON file of the run, or None if it has none.

        Raises:
            RunDirectoryError: it is damaged.
        """
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunDirectoryError(
                f"run: {path} cannot be read: {error}. Way out: remove it; `fdpg evaluate` and "
                "`fdpg train --resume` write theirs again"
            ) from error
        return content

    def append(self, log: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines to one of :data:`LOGS`.

        Raises:
            RunDirectoryError: they could not be written.
        """
        lines = "".join(json.dumps(_plain(record)) + "\n" for record in records)
        try:
            with (self.path / log).open("a", encoding="utf-8") as stream:
                stream.write(lines)
        except OSError as error:
            raise RunDirectoryError(f"run: cannot write {self.path / log}: {error}") from error

    def sync(self) -> None:
        """Asks the disk to keep the logs, before a checkpoint says that their steps are done."""
        for log in LOGS:
            path = self.path / log
            if path.is_file():
                sync(path)

    def read(self, log: str) -> list[dict[str, Any]]:
        """The lines of a log; a last line cut short by a crash is left out."""
        path = self.path / log
        if not path.is_file():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def rewind(self, step: int) -> None:
        """Drops what the logs say of steps that the checkpoint at ``step`` does not hold."""
        for log in LOGS:
            path = self.path / log
            if path.is_file():
                kept = [record for record in self.read(log) if record["step"] <= step]
                self.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        """Replaces a JSON file."""
        self.write_text(path, json.dumps(_plain(content), indent=1) + "\n")

    def write_text(self, path: Path, content: str) -> None:
        """Replaces a file in one step, so that a reader finds the old text or the new."""
        aside = path.with_name(f".writing-{path.name}")
        try:
            with aside.open("w", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(path)
        except OSError as error:
            raise RunDirectoryError(f"run: cannot write {path}: {error}") from error

    def _is_run(self) -> bool:
        config = self.path / "config.yaml"
        try:
            content = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and "objective" in content

    def require_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise RunDirectoryError(
                f"run: cannot write in {self.path}: {error.strerror}. Way out: another --out"
            ) from error


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become "inf", "-inf" and null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
