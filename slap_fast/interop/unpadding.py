"""The blocks of somebody else's encoder on the real tokens of a padded batch alone.

Hooks on the blocks: from the first to the last, hidden states are one row [1, T, C] of the T real
tokens instead of [B, L, C]; what goes in beside them (rotary tables, position ids, masks) is
gathered alike. After the last block they are [B, L, C] again, 0 at the padding. Everything else of
the model, and everybody who looks at it, sees padded tensors.

A block decides from its inputs alone, so a call that cannot do without padding (a cache, hidden
states asked for, dropout inside attention) runs with it, and a recomputed block does what it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slap_fast.models.hf_attention import counts_tokens
from slap_fast.models.packed_view import PackedMask

_HOOK_OWNERS = ("torch", "transformers", "accelerate", __name__.split(".")[0])
"""Packages whose hooks on blocks do not mind the shape of hidden states."""

_outer: ContextVar[tuple[bool, ...]] = ContextVar("outer", default=())
_seen: ContextVar[list[nn.Module] | None] = ContextVar("seen", default=None)


class _CannotGather(Exception):
    """A value beside the hidden states belongs to padded ones."""


class _Tokens(NamedTuple):
    """The real tokens of a padded batch."""

    index: Tensor
    """int64 [T], their positions in the batch [B x L]."""
    batch_size: int
    length: int

    @classmethod
    def of(cls, mask: PackedMask) -> _Tokens:
        order, _, length = mask.queries
        return cls(order[: mask.num_tokens], len(order) // length, length)

    def gather(self, value: Any) -> Any:
        """The value without what belongs to the padding: [B or 1, L, ...] -> [1, T, ...]."""
        if isinstance(value, PackedMask) and value.num_tokens is not None:
            return value.without_padding()
        if isinstance(value, tuple | list) and not isinstance(value, PackedMask):
            return type(value)(map(self.gather, value))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if not isinstance(value, Tensor) or self.length in value.shape[2:]:
            raise _CannotGather
        if value.ndim == 0:
            return value
        # Two axes might be [L, D]: only ids are surely [B, L].
        if value.ndim == 2 and value.is_floating_point():
            raise _CannotGather
        if value.shape[:2] == (self.batch_size, self.length):
            return value.flatten(0, 1).index_select(0, self.index)[None]
        if value.shape[:2] == (1, self.length):
            return value[0].index_select(0, self.index % self.length)[None]
        raise _CannotGather

    def pad(self, hidden: Tensor) -> Tensor:
        """[1, T, C] -> [B, L, C], 0 at the padding."""
        padded = hidden.new_zeros(self.batch_size * self.length, hidden.shape[-1])
        padded = padded.index_copy(0, self.index, hidden[0])
        return padded.unflatten(0, (self.batch_size, self.length))


def block_lists(root: nn.Module, attentions: list[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yields the lists of blocks in a model, by path: the innermost whose every block has one of
    the ``attentions``."""
    wanted = set(attentions)
    taken: set[nn.Module] = set()
    for name, module in reversed(list(root.named_modules())):
        if isinstance(module, nn.ModuleList) and len(module):
            has_one = all(wanted & set(block.modules()) for block in module)
            if has_one and not taken & set(module.modules()):
                taken.add(module)
                yield name, module


def install(
    root: nn.Module, name: str, blocks: nn.ModuleList, *, pairs: bool
) -> list[RemovableHandle]:
    """Hooks that let a list of blocks run without padding, and the models around it decide when.

    With ``pairs`` also where those take a mask [B, 1, L, L] that says no more than one of tokens.
    """
    handles = [block.register_forward_pre_hook(_enter, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(_leave, with_kwargs=True))
    for path, module in root.named_modules():
        if hasattr(module, "config") and (not path or name.startswith(f"{path}.")):
            hooks = module._forward_pre_hooks.values()
            if _allow not in hooks:
                handles.append(module.register_forward_pre_hook(_allow, with_kwargs=True))
                handles.append(module.register_forward_hook(_forget, always_call=True))
            if pairs and _pack_mask not in hooks:
                handles.append(module.register_forward_pre_hook(_pack_mask, with_kwargs=True))
    return handles


@contextmanager
def recorded() -> Iterator[list[nn.Module]]:
    """The last blocks that ended a run without padding, while it lasts."""
    seen: list[nn.Module] = []
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def _allow(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a model: whether its masks count their tokens, and so its blocks may drop padding."""
    if torch.compiler.is_compiling():
        return
    outer = _outer.get()
    allowed = all(outer) and not _asks_for_inner_states(model, kwargs) and _can_do_without(model)
    _outer.set((*outer, allowed))
    counts_tokens.set(allowed)


def _pack_mask(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if torch.compiler.is_compiling() or not counts_tokens.get():
        return None
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    packed = PackedMask.from_keys(mask)
    return None if packed is None else (args, {**kwargs, "attention_mask": packed})


def _forget(model: Any, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    _outer.set(_outer.get()[:-1])
    counts_tokens.set(bool(_outer.get()) and all(_outer.get()))


def _asks_for_inner_states(model: Any, kwargs: dict[str, Any]) -> bool:
    """output_hidden_states, output_attentions, output_router_logits: of the padded batch."""
    settings = [(key.lstrip("_"), value is True) for key, value in vars(model.config).items()]
    asked = [(key, value is not None and value is not False) for key, value in kwargs.items()]
    return any(wanted and key.startswith("output_") for key, wanted in settings + asked)


def _can_do_without(model: nn.Module) -> bool:
    if model.training and any(_drops(key, value) for key, value in vars(model.config).items()):
        return False
    blocks = (m for m in model.modules() if _enter in m._forward_pre_hooks.values())
    return not any(_has_other_hooks(module) for block in blocks for module in block.modules())


def _drops(key: str, value: Any) -> bool:
    """Dropout inside attention, or blocks that are left out, perhaps the last of them."""
    inner = "att" in key and "drop" in key or "layerdrop" in key.replace("_", "")
    return inner and isinstance(value, float) and value > 0


def _has_other_hooks(module: nn.Module) -> bool:
    hooks = chain(
        module._forward_hooks.values(),
        module._forward_pre_hooks.values(),
        module._backward_hooks.values(),
        module._backward_pre_hooks.values(),
    )
    return any(
        getattr(hook, "__module__", "").partition(".")[0] not in _HOOK_OWNERS for hook in hooks
    )


def _enter(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a block: its arguments without the padding, where all of them can be."""
    mask = _mask_in(args, kwargs)
    if mask is None or mask.num_tokens is None:
        return None
    tokens = _Tokens.of(mask)
    place = 0 if args else "hidden_states"
    inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    hidden = inputs.pop(place)
    is_row = hidden.shape[:2] == (1, mask.num_tokens)
    try:
        inputs = {key: tokens.gather(value) for key, value in inputs.items()}
        hidden = hidden if is_row else tokens.gather(hidden)
    except _CannotGather:
        hidden = tokens.pad(hidden) if is_row else hidden
    inputs = {place: hidden, **inputs}
    gathered = tuple(value for key, value in inputs.items() if isinstance(key, int))
    return gathered, {key: value for key, value in inputs.items() if isinstance(key, str)}


def _leave(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the last block: its output with the padding again."""
    mask = _mask_in(args, kwargs)
    if mask is None or mask.padded is None:
        return None
    seen = _seen.get()
    if seen is not None:
        seen.append(block)
    pad = _Tokens.of(mask.padded).pad
    return (pad(output[0]), *output[1:]) if isinstance(output, tuple) else pad(output)


def _mask_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedMask | None:
    values = chain(args, kwargs.values())
    return next((value for value in values if isinstance(value, PackedMask)), None)
