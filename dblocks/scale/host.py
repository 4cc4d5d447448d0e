"""Buffers of bytes on the host: in memory, pinned where there is an accelerator, or in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Host = Literal["pinned", "file"]


def host_buffer(nbytes: int, host: Host, device: torch.device, folder: Path | None) -> Tensor:
    """Bytes on the host, uint8 [nbytes].

    Args:
        nbytes: number of bytes.
        host: "pinned" for pinned memory; "file" for a memory-mapped file, which is unlinked, so
            that it does not outlive the process.
        device: the device that the buffer is copied to.
        folder: folder of the file; None for the default of `tempfile`.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if host == "pinned":
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=device.type != "cpu")
    file, path = tempfile.mkstemp(prefix="dblocks-", suffix=".resident", dir=folder)
    try:
        # Space is reserved now: on a full disk, a later write to the mapping would kill the
        # process.
        os.posix_fallocate(file, 0, nbytes)
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
    except OSError as error:
        raise OSError(
            error.errno,
            f'host="file" needs {nbytes:,} bytes on disk, got: {error.strerror}; '
            "free some space, or use another folder",
            path,
        ) from error
    finally:
        os.close(file)
        os.unlink(path)
