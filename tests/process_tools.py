"""Several processes of this one, as torchrun would start them."""

import os
import signal
import socket
import sys
import time
import traceback

SECONDS = 240  # on a busy machine; each takes a few


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(count, call, folder):
    """The exit codes and outputs of `call()` in so many processes that know of each other."""
    port, processes = free_port(), []
    for rank in range(count):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        code = 9
        try:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
            with (folder / f"output-{rank}").open("w") as output:
                sys.stdout = sys.stderr = output
                try:
                    code = call() or 0
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    codes = [_ended(process, time.monotonic() + SECONDS) for process in processes]
    return codes, [(folder / f"output-{rank}").read_text() for rank in range(count)]


def _ended(process, until):
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
