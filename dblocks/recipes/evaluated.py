"""The data that `dblocks eval` measures on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dblocks.checkpoint import current
from dblocks.checkpoint.networks import RECORD_FILE
from dblocks.config import read_json

# Names of the loaders for options of a run.
LOADED = {"data_path": "path", "image_size": "size"}


def data_of(folder: Path, **given: Any) -> tuple[str, dict[str, Any]]:
    """The name and the further options of the data, for `load_images` or `load_corpus`.

    Without `--data` all of them are those of the training, but for the given ones.

    Args:
        folder: of the network; its run.json says what it was trained on.
        **given: the values of `--data` and the options of data; None where there is none.

    Raises:
        ValueError: there is neither `--data` nor a record of the training.
    """
    if given["data"] is None:
        path = current(folder, RECORD_FILE)
        record = read_json(path) if path.exists() else {}
        run = record.get("run") if isinstance(record, dict) else None
        if not isinstance(run, dict) or not isinstance(run.get("data"), str):
            raise ValueError(
                f"--data must name the data, as {folder} has no {RECORD_FILE} that says what the "
                "network was trained on"
            )
        given = {name: run.get(name) if value is None else value for name, value in given.items()}
    options = {LOADED.get(name, name): v for name, v in given.items() if v is not None}
    return options.pop("data"), options
