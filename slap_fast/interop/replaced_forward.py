"""Another forward for one module of somebody else's, which its copies have too.

A function in the instance's ``__dict__`` stays bound to that instance: a deepcopy or a replica of
DataParallel would run on the original's weights. So the module gets a class of its own, of the same
name, whose forward asks the instance what to run; it is pickled as an instance of the first class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_ATTRIBUTE = "_slap_fast_forward"


def replace(module: nn.Module, function: Callable[..., Any], *args: Any) -> None:
    """Lets ``function(module, *args, *inputs)`` be a module's forward, until :func:`restore`.

    The function and ``args`` are copied and pickled with the module: they hold nothing of it.
    """
    module.__class__ = _class_for(type(module))
    module.__dict__[_ATTRIBUTE] = function, args


def restore(module: nn.Module) -> None:
    """Gives a module its own forward back, whatever was wrapped around it since."""
    module.__dict__.pop(_ATTRIBUTE, None)
    if _ATTRIBUTE in vars(type(module)):
        module.__class__ = type(module).__base__


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is not its class's."""
    return not module.__dict__.keys().isdisjoint({"forward", _ATTRIBUTE})


def own(module: nn.Module) -> Callable[..., Any]:
    """A module's own forward."""
    kinds = (kind.__base__ for kind in type(module).__mro__ if _ATTRIBUTE in vars(kind))
    return functools.partial(next(kinds, type(module)).forward, module)


@functools.cache
def _class_for(kind: type[Any]) -> type[Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        function, first = getattr(self, _ATTRIBUTE, None) or (kind.forward, ())
        return function(self, *first, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = kind.__reduce_ex__(self, protocol)
        return _new, (kind,), *state

    # Not functools.wraps: accelerate's unwrap_model would follow __wrapped__ past it.
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    forward.__doc__ = kind.forward.__doc__
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    more = {"forward": forward, "__reduce_ex__": reduce, _ATTRIBUTE: None}
    return type(kind)(kind.__name__, (kind,), {**names, **more})


def _new(kind: type[Any]) -> nn.Module:
    made = _class_for(kind)
    return made.__new__(made)
