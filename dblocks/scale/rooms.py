"""Memory on the device for the parameters, or the optimizer state, of one block or two blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.scale.layout import Item, Layout
from dblocks.scale.transfers import Transfers

Allocate = Callable[[int], Tensor]


class Home:
    """Host memory of one block's tensors while they are not on the device.

    Args:
        items: returns the current tensors.
        allocate: allocates a host buffer of a number of bytes.
        fixed: whether number, shapes and dtypes of the tensors must not change; an optimizer
            creates its state at its first step.
    """

    def __init__(self, items: Callable[[], list[Item]], allocate: Allocate, *, fixed: bool) -> None:
        self.items, self.allocate, self.fixed = items, allocate, fixed
        self.layout = Layout([])
        self.buffer = allocate(0)

    def look(self) -> bool:
        """Whether the tensors fit the buffer; if not, allocates a new one.

        Raises:
            RuntimeError: they do not fit and are `fixed`.
        """
        items = self.items()
        if self.layout.adopt(items):
            return True
        if self.fixed and self.layout.items:
            found = ", ".join(self.layout.misfits(items))
            raise RuntimeError(
                "the number, shapes and dtypes of a resident model's parameters and buffers must "
                f"not change, got {found}; call close() before you change the model"
            )
        self.layout = Layout(items)
        self.buffer = self.allocate(self.layout.nbytes)
        return False

    def take_in(self, before: Callable[[], None]) -> None:
        """Copies tensors outside of the buffer into it, from any device."""
        self.look()
        if strays := self.layout.strays(self.buffer):
            before()
            for item, place in strays:
                view = place.view(self.buffer)
                view.copy_(item.read())
                item.place(view)


class Coming(NamedTuple):
    """A block whose copy to the device was started."""

    block: int
    arena: Tensor | None
    mark: torch.Event | None
    versions: list[int]


class Room:
    """Memory on the device for the tensors of one block or two blocks.

    The buffers on the device, called arenas, are reused in the order of the side stream, so that
    the caching allocator need not know about that stream.

    Args:
        homes: the host memory of each block.
        transfers: the side stream.
        size: number of blocks that fit, 1 or 2.
    """

    def __init__(self, homes: Sequence[Home], transfers: Transfers, size: int) -> None:
        self.homes, self.transfers, self.size = homes, transfers, size
        self.here: int | None = None
        self.coming: Coming | None = None
        self.arena: Tensor | None = None
        self.free: list[Tensor] = []
        self.versions: list[int] = []
        self.left: torch.Event | None = None

    def prefetch(self, block: int) -> None:
        """Starts to copy a block in addition to the current one, if there is room for two."""
        if self.size == 2 and block != self.here and (not self.coming or self.coming[0] != block):
            self.cancel()
            self._start(block)

    def fetch(self, block: int) -> None:
        """Starts to copy a block, unless it is on the device or being copied."""
        if block == self.here:
            return
        if self.coming is not None and self.coming.block != block:
            self.cancel()
        if self.coming is None:
            self.leave()
            self._start(block)

    def arrive(self, block: int) -> None:
        """Makes the computation wait for a fetched block, which becomes the current one."""
        if block == self.here:
            return
        coming, home = self.coming, self.homes[block]
        if coming is None or coming.block != block or self._changed(coming):
            self.cancel()
            self.leave()
            coming = self._start(block)
        self.leave()
        self.transfers.compute_waits(coming.mark)
        self.here, self.arena, self.coming = block, coming.arena, None
        if coming.arena is not None:
            home.layout.bind(coming.arena)
        self.versions = home.layout.versions()

    def leave(self) -> None:
        """Starts to copy the current block back; its tensors are on the host from now on."""
        if self.here is None:
            return
        home, arena = self.homes[self.here], self.arena
        if home.look() and arena is not None:
            self._copy_back(home, arena)
        else:
            # The state that the optimizer created at its first step; it is freed at once.
            home.take_in(self.settle)
            self.transfers.wait_for_compute()
        home.layout.bind(home.buffer)
        if arena is not None:
            self.free.append(arena)
        self.here = self.arena = None

    def cancel(self) -> None:
        """Cancels the copy of a block; its tensors are still on the host."""
        if self.coming is not None and self.coming.arena is not None:
            self.free.append(self.coming.arena)
        self.coming = None

    def settle(self) -> None:
        """Waits until all copies to the host are complete."""
        if self.left is not None:
            self.left.synchronize()
            self.left = None

    def empty(self) -> None:
        """Moves everything to the host and frees the memory on the device."""
        self.cancel()
        self.leave()
        self.settle()
        self._discard()

    def gather(self) -> None:
        """Copies the tensors of all blocks into the host buffers."""
        for home in self.homes:
            home.take_in(self.settle)

    def _start(self, block: int) -> Coming:
        home = self.homes[block]
        home.take_in(self.settle)
        nbytes = home.layout.nbytes
        arena, mark = None, None
        if nbytes:
            arena = self._arena(nbytes)
            self.transfers.bring(arena[:nbytes], home.buffer)
            mark = self.transfers.mark()
        else:
            # The optimizer will create its state: free the arena kept for another block.
            self._discard()
        self.coming = Coming(block, arena, mark, home.layout.versions())
        return self.coming

    def _copy_back(self, home: Home, arena: Tensor) -> None:
        layout, transfers = home.layout, self.transfers
        for item, place in layout.strays(arena):
            place.view(arena).copy_(item.read())
        transfers.wait_for_compute()
        transfers.take(home.buffer[: layout.back], arena[: layout.back])
        for place in layout.thawed(self.versions):
            transfers.take(place.view(home.buffer), place.view(arena))
        self.left = transfers.mark()

    def _changed(self, coming: Coming) -> bool:
        """Whether the tensors on the host changed since they were copied."""
        home = self.homes[coming.block]
        if not home.look() or home.layout.strays(home.buffer):
            return True
        return home.layout.versions() != coming.versions

    def _arena(self, nbytes: int) -> Tensor:
        fits = [arena for arena in self.free if arena.numel() >= nbytes]
        if fits:
            self.free.remove(fits[0])
            return fits[0]
        self._discard()
        largest = max(home.layout.nbytes for home in self.homes)
        arena = torch.empty(largest, dtype=torch.uint8, device=self.transfers.device)
        # The allocator may return memory that the computation still uses.
        self.transfers.wait_for_compute()
        return arena

    def _discard(self) -> None:
        """Returns unused memory to the allocator of the computation's stream."""
        if self.free:
            self.transfers.compute_waits(self.transfers.mark())
            self.free.clear()
