"""Records what each stream reads and writes, and finds accesses that no wait has put in order.

A device that computes at once cannot show a copy that should have waited for the computation. The
order in which waits and copies are asked for shows it: two streams use one storage, one of them
writes, and the later one has not waited for what the earlier one did, as of
`torch.cuda._sanitizer`.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dblocks.scale.transfers import Transfers

COMPUTE, SIDE = 0, 1


class Trace(TorchDispatchMode):
    """The accesses of the default stream and of the one that is beside it.

    Args:
        kind: the type of the device.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conflicts = set()
        self.copies = 0
        """Accesses of the side stream."""
        self.now = [0, 0]
        self.known = [[0, 0], [0, 0]]  # of each stream: how far each is known to be done
        self.last = {}  # by storage: of each stream the last read and the last write

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        stream = SIDE if torch.accelerator.current_stream().stream_id else COMPUTE
        self.now[stream] += 1
        given = dict(zip([a.name for a in op._schema.arguments], args, strict=False)) | kwargs
        for argument in op._schema.arguments:
            alias = argument.alias_info
            if alias is None or alias.is_write:  # else it is looked at from another side only
                self._touch(op, stream, given.get(argument.name), alias is not None)
        result = op(*args, **kwargs)
        if all(returned.alias_info is None for returned in op._schema.returns):
            self._touch(op, stream, result, True)
        return result

    def wait(self, stream, reached):
        """From now on a stream comes after what was `reached`."""
        self.known[stream] = list(map(max, self.known[stream], reached))

    def reached(self, stream):
        """What comes before the next work of a stream."""
        found = list(self.known[stream])
        found[stream] = self.now[stream]
        return found

    def _touch(self, op, stream, values, writes):
        for value in tree_leaves(values):
            if not isinstance(value, torch.Tensor) or value.device.type != self.kind:
                continue
            if not (place := value.untyped_storage().data_ptr()):
                continue
            self.copies += stream == SIDE
            reads_writes = self.last.setdefault(place, [[0, 0], [0, 0]])
            read, wrote = reads_writes[1 - stream]
            before = max(read, wrote) if writes else wrote
            if before > self.known[stream][1 - stream]:
                self.conflicts.add((("compute", "side")[stream], op._schema.name))
            reads_writes[stream][writes] = self.now[stream]


@contextmanager
def traced(kind):
    """Within it, what a `Transfers` waits for is recorded; faults are planted inside of it."""
    trace = Trace(kind)
    wait, mark, compute_waits = (
        Transfers.wait_for_compute,
        Transfers.mark,
        Transfers.compute_waits,
    )
    marks = {}

    def recorded_wait(self):
        trace.wait(SIDE, trace.reached(COMPUTE))
        wait(self)

    def recorded_mark(self):
        event = mark(self)
        marks[id(event)] = event, trace.reached(SIDE)
        return event

    def recorded_arrival(self, event):
        if event is not None:
            trace.wait(COMPUTE, marks[id(event)][1])
        compute_waits(self, event)

    with (
        patch.object(Transfers, "wait_for_compute", recorded_wait),
        patch.object(Transfers, "mark", recorded_mark),
        patch.object(Transfers, "compute_waits", recorded_arrival),
        trace,
    ):
        yield trace
