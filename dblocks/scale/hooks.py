"""Hooks that call a residency, outside autograd modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def apart(function: F) -> F:
    """Makes a method run outside the caller's autograd and inference modes."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A parameter must not become an inference tensor, which the backward does not accept.
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, run)


class Gather:
    """Releases a residency before a state_dict is read or loaded; a copy does nothing."""

    def __init__(self, release: Callable[[], None] | None = None) -> None:
        self.release = release

    def __call__(self, *_: Any) -> None:
        if self.release is not None:
            self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gather:
        return Gather()

    def __reduce__(self) -> Any:
        return Gather, ()
