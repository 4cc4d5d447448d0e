"""Counts the memory of tensors that are alive."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The bytes of all tensors with memory that are alive, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            # A DTensor is as large as the whole, and has the memory of its part only.
            if is_traceable_wrapper_subclass(tensor):
                continue
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                self.sizes[key] = (storage._weak_ref(), storage.nbytes())
        self.most = max(self.most, self.bytes())
        return made

    def bytes(self):
        alive = torch.UntypedStorage._expired
        self.sizes = {k: (w, n) for k, (w, n) in self.sizes.items() if not alive(w)}
        return sum(n for _, n in self.sizes.values())
