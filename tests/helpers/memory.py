"""Peak memory of what runs inside a context."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """``most``: the most elements alive at once, of tensors made inside, in our operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "slap_fast":
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *arguments, **keywords or {})
        result = function(*arguments, **keywords or {})
        inputs = {id(x) for x in tree_leaves((arguments, keywords))}
        for made in tree_leaves(result):
            if not isinstance(made, torch.Tensor) or id(made) in inputs or function.is_view:
                continue
            self.live += made.numel()
            self.most = max(self.most, self.live)
            weakref.finalize(made, self.free, made.numel())
        return result

    def free(self, elements: int) -> None:
        self.live -= elements
