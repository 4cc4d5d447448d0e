"""The largest number of bytes that autograd holds for a backward at one time."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Held:
    """Stored by autograd instead of a tensor; freed when autograd frees the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class PeakSaved(saved_tensors_hooks):
    """Counts the bytes saved for the backward inside the `with` block, at their peak.

    `dblocks.blocks.memory.SavedActivations` counts everything that was saved, which is the same for
    one graph. If a graph is freed before the next one is built, the memory is that of the larger
    one.

    Args:
        parameters: parameters, which are not counted.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(self._pack, lambda held: held.tensor)
        self._excluded = {_storage(p) for p in parameters}
        self._holders: Counter[int] = Counter()
        self._now = 0
        self.peak = 0

    def __enter__(self) -> PeakSaved:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Held:
        held, key = _Held(tensor), _storage(tensor)
        if key not in self._excluded:
            size = tensor.untyped_storage().nbytes()
            if not self._holders[key]:
                self._now += size
                self.peak = max(self.peak, self._now)
            self._holders[key] += 1
            weakref.finalize(held, self._let_go, key, size)
        return held

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._now -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
