"""Checkpoints of training, which can be interrupted at any time and resumes bit for bit.

A checkpoint is a folder such as `step-00000100`, created by one rename. It holds one safetensors
file of tensors per object, everything else in `state.json`, and `checksums.txt` in the format of
sha256sum. Nothing in a checkpoint is executed when it is read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblocks._version import __version__
from dblocks.checkpoint import (
    appearing,
    discard,
    make_folder,
    naming,
    save_safetensors,
)
from dblocks.checkpoint.stored import Source
from dblocks.config import check_count, json_text, parse_json
from dblocks.scale.checksums import STATE_FILE, valid_files, write_checksums
from dblocks.scale.state import load_state_, pack, state_of, unpack

FORMAT = 1
SUFFIX = ".safetensors"
FOLDER_NAME = re.compile(r"step-(\d{8,})")
OBJECT_NAME = re.compile(r"[a-z][a-z0-9_]*")
MOST_NAMED = 5  # differences listed in a message


class Checkpoints:
    """The checkpoints of one training run, in their own folder.

    An object is anything with `state_dict` and `load_state_dict`, or a `torch.Generator`: a model,
    `BlockOptimizers`, an EMA, a GradScaler, a learning rate schedule, a position in the data.

        checkpoints = Checkpoints("runs/a/checkpoints", {"lr": 1e-3, "blocks": 3})
        objects = {"model": model, "optimizers": optimizers, "generator": generator}
        first = checkpoints.resume(objects) or 0
        for step in range(first, steps):
            ...
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1, objects)

    Args:
        folder: folder of the checkpoints; created if it does not exist.
        configuration: JSON values; only a checkpoint saved with the same values can be resumed.
        keep: number of checkpoints to keep; older ones are deleted.
        changeable: keys of the configuration, such as "steps" or "run.steps", whose values may
            differ from those in the checkpoint that is resumed; see `resumed`.
        background: whether a thread writes the files: `save` then returns as soon as the state is
            copied to the host. Call `wait` at the end, or use this as a context manager.

    Raises:
        TypeError: the configuration is not JSON; the message names the key.
        ValueError: the folder cannot be written to, or `keep` is not positive.
    """

    def __init__(
        self,
        folder: str | Path,
        configuration: Mapping[str, Any],
        *,
        keep: int = 2,
        changeable: Collection[str] = (),
        background: bool = False,
    ) -> None:
        self.folder, self.keep = Path(folder), check_count("keep", keep)
        self.configuration: Any = parse_json(_as_json(configuration))
        self.changeable = changeable
        self.resumed: Mapping[str, Any] = {}
        """The configuration of the checkpoint that was resumed, by dotted key."""
        self.last: int | None = None
        """The step of the last checkpoint saved or resumed."""
        self._thread = ThreadPoolExecutor(1, "dblocks-checkpoint") if background else None
        self._writing: tuple[int, Future[None]] | None = None
        self._refused: list[Path] = []
        make_folder(self.folder)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Waits; a failure to write does not replace an error that ended the `with` block."""
        try:
            self.wait()
        except OSError as failure:
            if kind is None:
                raise
            warnings.warn(str(failure), UserWarning, stacklevel=2)

    def wait(self) -> None:
        """Waits until a checkpoint being written in the background is complete.

        Raises:
            OSError: it could not be written; the message names its step. Earlier checkpoints are
                kept.
        """
        if self._writing is None:
            return
        (step, writing), self._writing = self._writing, None
        try:
            writing.result()
        except OSError as error:
            raise OSError(f"the checkpoint of step {step} was not written: {error}") from error

    def save(self, step: int, objects: Mapping[str, Any]) -> None:
        """Writes a checkpoint atomically, and deletes all but the last `keep`.

        With `background`, it first waits for the previous checkpoint.

        Args:
            step: number of steps taken.
            objects: the objects to save, by name; use the same names for `resume`.

        Raises:
            OSError: the checkpoint cannot be written, for example on a full disk; earlier ones are
                kept. With `background`, the previous checkpoint could not be written, and this one
                was not started.
            TypeError: `step` is not an integer, an object has no state, or a state holds values
                other than JSON and tensors.
            ValueError: `step` is negative; a name is not made of a-z, 0-9 and _; or the folder
                holds a later checkpoint of a run that was not resumed.
        """
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step must be an integer, got {step!r} of type {type(step).__name__}")
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        self.wait()
        if step == self.last:  # it exists already
            return
        newer = [p.name for p in self.found() if p not in self._refused and _step_of(p) > step]
        if newer:
            raise ValueError(
                f"{self.folder} must hold no later checkpoint than step {step}, got {newer[0]} of "
                "another run, which resume() would take; resume from it, or clear() first"
            )
        packed, tensors = {}, {}
        for name, holder in objects.items():
            _check_name(name)
            tensors[name] = {}
            packed[name] = pack(state_of(holder), tensors[name])
        state = {
            "format": FORMAT,
            "dblocks": __version__,
            "torch": torch.__version__,
            "step": step,
            "configuration": self.configuration,
            "objects": packed,
        }
        if self._thread is None:
            self._write(step, state, tensors)
            return
        # Training continues and changes the tensors.
        copies = {
            name: {key: tensor.to("cpu", copy=True) for key, tensor in held.items()}
            for name, held in tensors.items()
        }
        self._writing = step, self._thread.submit(self._write, step, state, copies)

    def _write(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        with appearing(self.folder / f"step-{step:08d}") as part:
            for name, held in tensors.items():
                if held:
                    save_safetensors(part / (name + SUFFIX), _apart(held))
            (part / STATE_FILE).write_text(json_text(state, indent=None), encoding="utf-8")
            write_checksums(part)
        self.last = step
        self._remove_old(step)

    def resume(self, objects: Mapping[str, Any]) -> int | None:
        """Loads the newest valid checkpoint into the objects.

        Returns:
            Its number of steps; None if there is no checkpoint yet.

        Raises:
            ValueError: all checkpoints are damaged, or the newest valid one has another
                configuration or other objects; the message says which.

        Warns:
            UserWarning: a checkpoint is damaged and an earlier one is tried; the message names the
                file.
        """
        self.wait()
        found = self.found()
        for path in found:
            with ExitStack() as files:
                try:
                    valid = valid_files(path, files)
                except ValueError as error:
                    wrong = str(error)
                else:
                    self._load(path, valid, objects)
                    return self.last
            self._refused.append(path)
            warnings.warn(
                f"checkpoint {path} is refused: {wrong}; the previous one is tried",
                UserWarning,
                stacklevel=2,
            )
        if found:
            raise ValueError(
                f"{self.folder} must hold a valid checkpoint, got {len(found)} damaged; restore "
                "the files named above, or start a new run in another folder"
            )
        return None

    def found(self) -> list[Path]:
        """The folders of the checkpoints, valid or not, newest first."""
        steps = {path: FOLDER_NAME.fullmatch(path.name) for path in self.folder.iterdir()}
        numbers = {path: int(match[1]) for path, match in steps.items() if match}
        return sorted(numbers, key=lambda path: numbers[path], reverse=True)

    def clear(self) -> None:
        """Remove all checkpoints."""
        self.wait()
        for path in self.found():
            discard(path)
        self.last = None

    def _load(self, path: Path, files: Mapping[str, Source], objects: Mapping[str, Any]) -> None:
        """Loads a checkpoint from its open files; everything is read before anything is loaded."""
        with naming(path / STATE_FILE):
            state = parse_json(files[STATE_FILE].read().decode())
            if not isinstance(state, dict) or state.get("format") != FORMAT:
                raise ValueError(f"it must be of format {FORMAT}")
        self._check_configuration(path, state["configuration"])
        names = sorted(state["objects"])
        if names != sorted(objects):
            raise ValueError(f"{path} must hold {sorted(objects)}, got {names}")
        found = {}
        for name in names:
            file = files.get(name + SUFFIX)
            with naming(path / (name + SUFFIX)):
                found[name] = unpack(state["objects"][name], {} if file is None else file.load())
        for name, holder in objects.items():
            with naming(path / (name + SUFFIX)):
                load_state_(holder, found[name])
        self.last = state["step"]

    def _check_configuration(self, path: Path, found: Any) -> None:
        there, here = _flat(found), _flat(self.configuration)
        self.resumed, places = there, {*there, *here} - {*self.changeable}
        other = [k for k in sorted(places) if there.get(k) != here.get(k)]
        if other:
            listed = [f"{k} was {there.get(k)!r} and is {here.get(k)!r}" for k in other]
            more = f" and {len(other) - MOST_NAMED} more" if len(other) > MOST_NAMED else ""
            raise ValueError(
                f"{path} has another configuration: {', '.join(listed[:MOST_NAMED])}{more}; "
                "resume with the original values, or write to another folder"
            )

    def _remove_old(self, step: int) -> None:
        numbers = {path: _step_of(path) for path in self.found()}
        before = [path for path, number in numbers.items() if number <= step]
        refused = [path for path in self._refused if numbers.get(path) != step]
        kept = [path for path in before if path not in refused][: self.keep]
        self._refused.clear()
        for path in {*before, *refused} - {*kept}:
            try:
                discard(path)
            except OSError as error:  # the new checkpoint is written, so this is only a warning
                warnings.warn(f"{path} cannot be removed: {error}", UserWarning, stacklevel=3)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors that share memory, which safetensors does not support."""
    seen: set[tuple[torch.device, int]] = set()
    apart = {}
    for name, tensor in tensors.items():
        key = tensor.device, tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if key in seen else tensor
        seen.add(key)
    return apart


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """The values of nested JSON objects, by dotted key."""
    if not isinstance(value, dict):
        return {place: value}
    parts = (_flat(v, f"{place}.{k}" if place else k) for k, v in value.items())
    return {k: v for part in parts for k, v in part.items()}


def _check_name(name: str) -> None:
    if not OBJECT_NAME.fullmatch(name):
        raise ValueError(f"the name of an object must be made of a-z, 0-9 and _, got {name!r}")


def _as_json(configuration: Any) -> str:
    if not isinstance(configuration, Mapping):
        raise TypeError(
            "configuration must be a mapping of names to JSON values, got "
            f"{type(configuration).__name__}; such as {{'lr': 1e-3}}"
        )
    for key, value in configuration.items():
        try:
            json_text({key: value})
        except (TypeError, RecursionError) as error:
            raise TypeError(
                f"configuration[{key!r}] must be a JSON value (text, numbers, lists, mappings of "
                f"text), got {type(value).__name__}: {error}; write it as one, such as str(...)"
            ) from error
    return json_text(dict(configuration))
