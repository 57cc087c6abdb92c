"""Checkpoints: directories that are complete or invisible, of safetensors and JSON only.

A checkpoint is written aside, synced to the disk, and renamed into place; its manifest carries the
size and SHA-256 of every file. A process killed at any instant leaves the earlier checkpoints as
they were. Nothing is pickled, so nothing runs when a checkpoint is opened.

    checkpoints/step-000040/
        manifest.json             what belongs here, with hashes; read first
        facts.json                step, seed and everything else that is not a tensor
        <part>.safetensors        policy, optimiser, state, ...
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Checkpoint", "CheckpointError", "latest", "load", "replace_directory", "save", "sync"]

FORMAT = 1
_ASIDE = ".writing-"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, damaged, or cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step: steps done; the next step has this number.
        tensors: part (a file) -> name -> tensor.
        facts: what is not a tensor; JSON types only.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes ``folder/step-N`` and then removes all but the ``keep`` newest checkpoints.

    An older checkpoint is removed only once the new one is complete.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; nothing was changed.
    """
    path = folder / f"step-{checkpoint.step:06d}"

    def fill(aside: Path) -> None:
        for part, tensors in checkpoint.tensors.items():
            plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(plain, aside / f"{part}.safetensors")
        facts = {"step": checkpoint.step, **checkpoint.facts}
        (aside / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        files = {file.name: _identity(file) for file in sorted(aside.iterdir())}
        manifest = {"format": FORMAT, "step": checkpoint.step, "files": files}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    replace_directory(path, fill)
    for _, old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint whose every file is as it was written.

    Raises:
        CheckpointError: a file is missing, has another size or hash, or is of another format.
    """
    way_out = f"Way out: remove {path} and resume from the checkpoint before it, or start anew"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint: {path} expected a manifest.json, found none: it was never finished. "
            f"{way_out}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {path}/manifest.json is damaged. {way_out}") from error
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint: {path} expected format {FORMAT}, got {version}. Way out: open it with "
            "the version of fdpg_fast that wrote it"
        )
    for name, expected in files.items():
        got = _identity(path / name) if (path / name).is_file() else None
        if got != expected:
            found = "no such file" if got is None else f"{got['bytes']} bytes, {got['sha256'][:12]}"
            raise CheckpointError(
                f"checkpoint: {path / name} expected {expected['bytes']} bytes, SHA-256 "
                f"{expected['sha256'][:12]}, got {found}. {way_out}"
            )
    try:
        facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
        tensors = {
            Path(name).stem: load_file(path / name)
            for name in files
            if name.endswith(".safetensors")
        }
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error}. {way_out}") from error
    return Checkpoint(step=facts.pop("step"), tensors=tensors, facts=facts)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    complete = _complete(folder)
    return complete[-1][1] if complete else None


def replace_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes ``path`` hold what ``fill`` writes, so that no reader ever sees half of it.

    Raises:
        CheckpointError: something could not be written; ``path`` is as it was.
    """
    aside = path.with_name(_ASIDE + path.name)
    retired = path.with_name(_ASIDE + path.name + "-old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in (aside, retired):
            shutil.rmtree(left_over, ignore_errors=True)
        aside.mkdir()
        fill(aside)
        for file in sorted(aside.rglob("*")):
            if file.is_file():  # safetensors' are for the owner alone, whatever the umask
                file.chmod(aside.stat().st_mode & 0o666)
            sync(file)
        sync(aside)
        if path.exists():  # a folder that is not empty cannot be renamed over
            path.rename(retired)
        aside.rename(path)
        sync(path.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if retired.exists() and not path.exists():
            retired.rename(path)
        raise CheckpointError(
            f"checkpoint: cannot write {path}: {error}. Way out: free disk space or choose a "
            "folder you may write to; earlier checkpoints are intact"
        ) from error


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints with a manifest, oldest first."""
    found = []
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and (path / "manifest.json").is_file():
            found.append((int(number), path))
    return sorted(found)


def _identity(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """Asks the disk to keep a file or folder before anything that depends on it is renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
