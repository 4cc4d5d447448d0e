"""Which file of the library calls which, while something runs."""

import sys
from pathlib import Path

import dblocks

PACKAGE = Path(dblocks.__file__).resolve().parent
KERNELS = (PACKAGE / "kernels").resolve()  # a link, in a checkout


def file_of(frame):
    """The file of the library that a frame is in, or None."""
    path = Path(frame.f_code.co_filename).resolve()
    for folder, prefix in ((PACKAGE, Path()), (KERNELS, Path("kernels"))):
        if path.is_relative_to(folder):
            return (prefix / path.relative_to(folder)).as_posix()
    return None


def calls_of(function):
    """Pairs of files of the library, of which the first one calls the second.

    The first is None where what is not of the library calls.
    """
    calls, known = set(), {}

    def file(frame):
        name = frame.f_code.co_filename
        if name not in known:
            known[name] = file_of(frame)
        return known[name]

    def seen(frame, event, _):
        called = file(frame) if event == "call" else None
        if called is None:
            return
        caller = frame.f_back
        while caller and file(caller) is None:
            caller = caller.f_back
        calls.add((file(caller) if caller else None, called))

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def files_of(calls):
    return {called for _, called in calls}


def reached(calls, file):
    """All files that are called from one, at any distance, other than by itself."""
    found, todo = set(), [file]
    while todo:
        here = todo.pop()
        new = {b for a, b in calls if a == here != b} - found
        found |= new
        todo += new
    return found


def circles(calls):
    """The files that call themselves through other ones."""
    return {file for file in files_of(calls) if file in reached(calls, file)}
