"""Copies between host and device, in order, on a side stream."""

from __future__ import annotations

import torch
from torch import Tensor


class Transfers:
    """Copies tensors on a side stream; with a CPU as the device, at once.

    Copies run one after the other. Copies and computation wait for each other only when a method
    says so.

    Args:
        device: the device to copy to and from.

    Raises:
        RuntimeError: the device is neither the CPU nor this machine's accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        found = torch.accelerator.current_accelerator()
        if device.type not in ("cpu", "" if found is None else found.type):
            raise RuntimeError(
                f"device must be the CPU or this machine's accelerator ({found}), got {device}"
            )
        self.device = device
        self.stream = None if device.type == "cpu" else torch.Stream(device=device)
        self.to_device = 0
        """Bytes copied to the device so far."""
        self.to_host = 0
        """Bytes copied back so far."""

    def bring(self, target: Tensor, source: Tensor) -> None:
        """Copies to the device."""
        self.to_device += source.nbytes
        self._copy(target, source)

    def take(self, target: Tensor, source: Tensor) -> None:
        """Copies to the host."""
        self.to_host += source.nbytes
        self._copy(target, source)

    def wait_for_compute(self) -> None:
        """Makes later copies wait for the computation so far."""
        if self.stream is not None:
            self.stream.wait_stream(self._compute())

    def mark(self) -> torch.Event | None:
        """An event that is reached when the copies so far are done."""
        return None if self.stream is None else self.stream.record_event()

    def compute_waits(self, mark: torch.Event | None) -> None:
        """Makes later computation wait for a mark."""
        if mark is not None:
            self._compute().wait_event(mark)

    def _compute(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if self.stream is None:
            target.copy_(source)
            return
        with self.stream:
            # Memory that is not pinned, such as a file, is copied at once: the host may change it.
            target.copy_(source, non_blocking=target.is_pinned() or source.is_pinned())


def device_named(device: torch.device | str) -> torch.device:
    """The `torch.device` with a name.

    Raises:
        RuntimeError: PyTorch has no such device.
        TypeError: `device` is neither a device nor a name.
    """
    if not isinstance(device, (torch.device, str)):
        raise TypeError(
            f"device must be a torch.device or its name, got {device!r}; such as 'cuda'"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise RuntimeError(
            f"device must be the CPU or this machine's accelerator, got {device!r}, which PyTorch "
            "does not know; such as 'cpu', 'cuda' or 'cuda:0'"
        ) from error
