"""Keeps one block at a time on a device: its parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from dblocks.blocks import BlockOptimizers, DiffusionBlocks
from dblocks.blocks.training import blocks_of
from dblocks.scale.hooks import Gather, apart
from dblocks.scale.host import Host, host_buffer
from dblocks.scale.ownership import (
    check_optimizers,
    held_items,
    owned,
    several,
    state_items,
)
from dblocks.scale.rooms import Home, Room
from dblocks.scale.transfers import Transfers, device_named
from dblocks.schedules.random import draw_seed

Prefetch = Literal["none", "parameters", "all"]
VISITS_AHEAD = 64


def resident(
    model: DiffusionBlocks,
    optimizers: BlockOptimizers,
    device: torch.device | str,
    *,
    steps_per_visit: int = 1,
    prefetch: Prefetch = "none",
    host: Host = "pinned",
    folder: str | Path | None = None,
) -> Residency:
    """Keeps one block at a time on a device, and the others on the host.

    The device holds the parameters, gradients and optimizer state of the trained block, the buffers
    in its layers, and the shared modules. `train_step` and all other uses of the model do not
    change: running a block moves it to the device first. Results are bitwise the same as without
    residency, for the same order of blocks.

    A visit is `steps_per_visit` steps of `train_step` on one block, drawn at the first step; as
    many numbers are drawn from the generator as without residency. A copy of the generator predicts
    the block of the next visit, which is copied on a side stream during this visit.

    Bytes on the device, with P the bytes of the largest block's float32 parameters, A of its
    activations, X of the optimizer's temporaries (0 for a fused AdamW, P for foreach, the default),
    and S of the shared modules::

        max(4P + A, 4P + X) + S       prefetch="none", of AdamW: parameters, gradients, two moments
                            + P       prefetch="parameters"
                            + 3P      prefetch="all"

    A visit copies the parameters (P to the device; P back, except frozen ones) and the state (2P
    each way). With `prefetch="none"` the computation waits for the copies of the parameters; the
    state is copied during the first forward and backward. With "parameters" it does not wait if the
    first step takes at least as long as copying the state, and with "all" if the visit takes at
    least as long as copying everything.

    For each block, one host buffer holds the parameters and one the state. PyTorch rounds pinned
    memory up to a power of two; `PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1` prevents that.

    Accumulated gradients move with their block. A tensor taken from a parameter (`p.data`,
    `p.detach()`) is valid during this visit only. Parameters may be changed in place at any time,
    but after a write through `.data` to a block that is not active, call `release()`; such a write
    to a frozen parameter is lost.

    Args:
        model: the network, on any device, possibly inside the wrapper of torch.compile.
        optimizers: from `make_optimizers`, new or with state.
        device: device on which blocks run; "cpu" is possible too, for example with `host="file"`.
        steps_per_visit: steps on a block before the next one is drawn.
        prefetch: the part of the next block that is copied before its visit.
        host: storage of the other blocks: "pinned" memory (ordinary memory without an accelerator),
            or a memory-mapped "file", whose copies do not overlap with computation.
        folder: folder of the files; by default that of `tempfile`, which may itself be in memory.

    Returns:
        The residency, which has `release` and `close`; the model keeps it too.

    Raises:
        OSError: a file cannot be created; the message gives its size.
        RuntimeError: the model is already resident, or this machine does not have the device.
        TypeError: the model, the optimizers or a tensor has a type that is not supported.
        ValueError: a parameter is in no block, or shares memory with another; an optimizer has
            other parameters; the clean loss of a converted model needs all blocks; or another value
            is invalid.

    Example::

        model = DiffusionBlocks(network, BlocksConfig(num_blocks=4))
        optimizers = make_optimizers(model, lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
        residency = resident(model, optimizers, "cuda", steps_per_visit=10, prefetch="all")
        for batch in batches:
            train_step(model, batch, optimizers)
        residency.close() # everything is on the CPU again
    """
    whole = blocks_of(model)
    if not isinstance(whole, DiffusionBlocks):
        raise TypeError(
            "model must be a DiffusionBlocks, got a single Block, which needs no residency; "
            "move it to the device"
        )
    model = whole
    if not isinstance(optimizers, BlockOptimizers):
        raise TypeError(
            f"optimizers must be BlockOptimizers, got {type(optimizers).__name__}; "
            "call make_optimizers(model, factory)"
        )
    for name, value, allowed in (
        ("prefetch", prefetch, get_args(Prefetch)),
        ("host", host, get_args(Host)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if folder is not None and host != "file":
        raise ValueError(
            f'folder must be None with host={host!r}, got {folder}; it belongs to host="file"'
        )
    if isinstance(steps_per_visit, bool) or not isinstance(steps_per_visit, int):
        raise TypeError(f"steps_per_visit must be an integer, got {steps_per_visit!r}")
    if steps_per_visit < 1:
        raise ValueError(f"steps_per_visit must be at least 1, got {steps_per_visit}")
    if model.residency is not None:
        raise RuntimeError("model must not be resident yet; call close() on its residency first")
    if getattr(model, "clean_loss_weight", 0):
        raise ValueError(
            "a resident model must not have a clean loss, which runs all blocks, got "
            f"clean_loss_weight={cast(Any, model).clean_loss_weight}; convert without it"
        )
    place = device_named(device)
    allocate = partial(
        host_buffer, host=host, device=place, folder=None if folder is None else Path(folder)
    )
    return Residency(model, optimizers, place, allocate, steps_per_visit, prefetch)


class Residency:
    """The result of `resident`: moves the blocks of a model between host and device.

    Args:
        model: the network.
        optimizers: the optimizers of its blocks.
        device: device on which blocks run.
        allocate: allocates host buffers.
        steps_per_visit: steps on a block before the next one is drawn.
        prefetch: the part of the next block that is copied in advance.
    """

    @apart
    def __init__(
        self, model: DiffusionBlocks, optimizers: BlockOptimizers, device: torch.device,
        allocate: Callable[[int], torch.Tensor], steps_per_visit: int, prefetch: Prefetch,
    ) -> None:  # fmt: skip
        self.model, self.optimizers, self.device = model, optimizers, device
        self.steps_per_visit, self.prefetch = steps_per_visit, prefetch
        self.transfers = Transfers(device)
        # Before its first use, a converted model runs all layers for a check.
        model.before_use()
        found = owned(model)
        ids = [{id(v[n]): p for p, _, v, n in named} for named in found.blocks]
        check_optimizers(
            optimizers, [set(held) for held in ids], {id(v[n]) for _, _, v, n in found.shared}
        )
        homes = []
        for named in found.blocks:
            expected = {p: id(v[n]) for p, m, v, n in named if v is m._parameters}
            homes.append(Home(partial(held_items, named, expected), allocate, fixed=True))
        states = [
            Home(partial(self._state, b), allocate, fixed=False)
            for b in range(model.config.num_blocks)
        ]
        self.parameters = Room(homes, self.transfers, 1 if prefetch == "none" else 2)
        self.states = Room(states, self.transfers, 2 if prefetch == "all" else 1)
        self.shared = found.shared
        self.parameters.gather()
        self.states.gather()
        self._place_shared(device)
        self._block, self._left, self._looked = 0, 0, False
        self._handles = ExitStack()
        self._add_hooks({id(m): m for named in found.blocks for _, m, _, _ in named})
        model.residency = self

    @property
    def block(self) -> int | None:
        """The block whose parameters are on the device; None if there is none."""
        return self.parameters.here

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes copied to the device and back so far."""
        return self.transfers.to_device, self.transfers.to_host

    def acquire(self, block: int) -> None:
        """Moves a block to the device before it runs; with gradients enabled, its state too."""
        trains = torch.is_grad_enabled()
        if block != self.parameters.here:
            self._cancel()
        self._bring(int(block), trains)

    def visit(
        self, block: int, optimizers: Any, generator: torch.Generator | None, *, drawn: bool
    ) -> int:
        """The block of this step, moved to the device with its state; called by `train_step`.

        Args:
            block: the block that was given or drawn.
            optimizers: the optimizers of the step.
            generator: the generator of the step.
            drawn: whether `block` was drawn from `generator`; a drawn block is used only at the
                start of a visit.

        Raises:
            ValueError: the optimizers are not those of the residency.
        """
        if optimizers is not self.optimizers:
            raise ValueError(
                "optimizers must be those passed to resident(), got others, whose state "
                "would stay on the device; call close(), and resident() with these"
            )
        if not drawn:
            self.acquire(block)
            return block
        if self._left == 0:
            self._block, self._left, self._looked = block, self.steps_per_visit, False
        self._bring(self._block, True)
        if not self._looked and self.prefetch != "none":
            self._looked = True
            self._prefetch(self._next(generator))
        self._left -= 1
        return self._block

    @apart
    def release(self) -> None:
        """Copies everything to the host, and waits for the copies.

        Reading or loading a state_dict of the model or an optimizer calls this.
        """
        self._looked = False
        self.parameters.empty()
        self.states.empty()

    @apart
    def close(self) -> None:
        """Ends the residency: moves model and optimizers to the CPU, in separate tensors again.

        Afterwards a block is drawn in every step.
        """
        if self.model.residency is not self:
            return
        self.release()
        for home in (*self.parameters.homes, *self.states.homes):
            for item in home.layout.items:
                item.place(item.read().clone(memory_format=torch.preserve_format))
        self._place_shared(torch.device("cpu"))
        self._move_counts(range(len(self.optimizers.blocks)), torch.device("cpu"))
        self._handles.close()
        self.model.residency = None

    def state_dict(self) -> dict[str, int]:
        """The position in the visit, to resume with the same sequence of blocks."""
        return {"block": self._block, "left": self._left}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores a state of `state_dict`.

        Raises:
            ValueError: the number of blocks or of steps per visit differs.
        """
        block, left = state["block"], state["left"]
        if not 0 <= block < len(self.optimizers.blocks) or not 0 <= left < self.steps_per_visit:
            raise ValueError(
                f"state must be that of {len(self.optimizers.blocks)} blocks and "
                f"{self.steps_per_visit} steps a visit, got block {block} and {left} steps left"
            )
        self._block, self._left, self._looked = block, left, False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # A copy of the model is not resident.
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @apart
    def _bring(self, block: int, trains: bool) -> None:
        self.parameters.fetch(block)
        self.parameters.arrive(block)
        if trains:
            self.states.fetch(block)
            if self.prefetch == "all":
                self.states.arrive(block)

    @apart
    def _prefetch(self, block: int | None) -> None:
        if block is not None:
            self.parameters.prefetch(block)
            self.states.prefetch(block)

    def _cancel(self) -> None:
        # What happened since may have changed the next block.
        self._looked = False
        self.parameters.cancel()
        self.states.cancel()

    def _next(self, generator: torch.Generator | None) -> int | None:
        """The next other block that the generator will draw; None if there is none."""
        source = torch.default_generator if generator is None else generator
        ahead = torch.Generator().set_state(source.get_state())
        num_blocks, steps = self.model.config.num_blocks, self._left
        for _ in range(VISITS_AHEAD):
            drawn = self._block
            for _ in range(steps):
                draw_seed(ahead)
                drawn = int(torch.randint(num_blocks, (), generator=ahead, device="cpu"))
            if drawn != self._block:
                return drawn
            steps = self.steps_per_visit
        return None

    def _state(self, block: int) -> Any:
        return state_items(
            several(self.optimizers.blocks[block]), self.parameters.homes[block].layout.items
        )

    def _place_shared(self, device: torch.device) -> None:
        items = held_items(self.shared, {})
        states = state_items(several(self.optimizers.shared), items)
        for item in (*items, *states):
            if item.read().device != device:
                item.place(item.read().to(device))
        self._move_counts([None], device)

    def _move_counts(self, blocks: Any, device: torch.device) -> None:
        """Moves step counts that an optimizer keeps on the device of its parameters."""
        for block in blocks:
            held = self.optimizers.shared if block is None else self.optimizers.blocks[block]
            for optimizer in several(held):
                for group in optimizer.param_groups:
                    if group.get("fused") or group.get("capturable"):
                        for parameter in group["params"]:
                            values = optimizer.state.get(parameter) or {}
                            for key, value in values.items():
                                if isinstance(value, torch.Tensor) and not value.ndim:
                                    values[key] = value.to(device)

    def _add_hooks(self, modules: dict[int, nn.Module]) -> None:
        gather = Gather(self.release)
        for module in modules.values():
            self._keep(module.register_state_dict_pre_hook(gather))
            self._keep(module.register_load_state_dict_pre_hook(gather))
        for block, held in enumerate(self.optimizers.blocks):
            for optimizer in several(held):
                self._keep(optimizer.register_step_pre_hook(partial(self._before_step, block)))
                self._keep(optimizer.register_step_post_hook(self._after_step))
                self._keep(optimizer.register_state_dict_pre_hook(gather))
                self._keep(optimizer.register_load_state_dict_pre_hook(gather))

    def _keep(self, handle: Any) -> None:
        self._handles.callback(handle.remove)

    @apart
    def _before_step(self, block: int, optimizer: Optimizer, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if block != self.block and all(p.grad is None for p in held):
            return
        if block != self.block:
            self._cancel()
            self._bring(block, True)
        self.states.arrive(block)
        self._move_counts([block], self.device)

    @apart
    def _after_step(self, *_: Any) -> None:
        # From here on, parameters that are copied to the host have their final values.
        self.parameters.settle()
        self.states.settle()
