"""Several processes, as torchrun would start them.

Each is a fresh interpreter: a fork of one that has threads may wait for a lock for ever.
"""

import os
import socket
import subprocess
import sys
import time

from tools import ROOT

SECONDS = 240  # on a busy machine; each takes a few


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(count, arguments, folder, *, of_rank=lambda rank: ()):
    """The exit codes and outputs of `python *arguments *of_rank(rank)` in so many processes.

    They know of each other, and their outputs are files in the folder.
    """
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    common = os.environ | {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    outputs = [folder / f"output-{rank}" for rank in range(count)]
    started = []
    for rank, path in enumerate(outputs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONHASHSEED": str(rank)}
        with path.open("w") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments), *map(str, of_rank(rank))],
                    env=common | own, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                )
            )  # fmt: skip
    until = time.monotonic() + SECONDS
    try:
        codes = [process.wait(max(until - time.monotonic(), 0)) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return codes, [path.read_text() for path in outputs]
