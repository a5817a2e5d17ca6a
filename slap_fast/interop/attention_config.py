"""Which attention a transformers model runs: set in configs of its own, and given back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from slap_fast.models import hf_attention


def own_configs(model: nn.Module) -> Callable[[], None]:
    """Gives a model configs of its own, which other models may share.

    Returns a function that gives it the first ones back, unless the model's changed since.
    """
    copies: dict[int, Any] = {}
    before: list[tuple[Any, Any, Any]] = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, sys.modules["transformers"].PreTrainedConfig):
            module.config = copy.deepcopy(config, copies)
            before.append((module, config, module.config))

    def give_back() -> None:
        if all(m.config is own and _values(own) == _values(config) for m, config, own in before):
            for module, config, _ in before:
                module.config = config

    return give_back


def _values(config: Any) -> dict[str, Any]:
    """All that a config holds: its own == leaves out the attention, and fields of the user's."""
    kind = sys.modules["transformers"].PreTrainedConfig
    values = vars(config).items()
    return {name: _values(x) if isinstance(x, kind) else x for name, x in values}


def set_packed(root: Any, group: Any) -> Callable[[], None]:
    """Lets one model in ``root`` run packed attention.

    Returns a function that sets what ran before wherever packed attention still runs.
    """
    models = [module for module in root.modules() if "config" in module.__dict__]
    before = [module.config._attn_implementation_internal for module in models]

    def restore() -> None:
        for module, implementation in zip(models, before, strict=True):
            if module.config._attn_implementation_internal == hf_attention.NAME:
                module.config._attn_implementation_internal = implementation

    try:
        group.set_attn_implementation({"": hf_attention.NAME})
    except BaseException:
        restore()
        raise
    return restore
