"""The loss of somebody else's language model in chunks, without its logits."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slap_fast import losses
from slap_fast.interop import replaced_forward, third_party_layers
from slap_fast.interop.probe import evaluating, one_line, unready


def candidate(model: Any) -> tuple[str | None, tuple[Any, ...]] | None:
    """Why a model's loss must stay its own, or the function and its first arguments that replace
    the model's forward; None for a model without an output layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        return None
    shift = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}.get(model.loss_function.__name__)
    obstacle = None
    if shift is None:
        obstacle = f"its loss is {model.loss_function.__name__}"
    elif head.bias is not None:
        obstacle = "the output layer has a bias, which the fused loss has not"
    elif replaced_forward.is_replaced(model):
        obstacle = "its forward was replaced before"
    else:
        obstacle = unready(model) or _loss_obstacle(model, shift)
    return obstacle, (_forward_with_chunked_loss, model.loss_function, shift)


def _forward_with_chunked_loss(
    model: Any,
    loss_function: Callable[..., Any],
    shift: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's forward; of a batch with labels, under grad, its loss without logits.

    Its own forward runs where the logits are needed (no gradient: evaluation; a tuple), and where
    the loss or the output layer are no longer those that were proven.
    """
    forward = replaced_forward.own(model)
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    head = model.get_output_embeddings()
    if (
        arguments.get("labels") is None
        or not torch.is_grad_enabled()
        or arguments.get("return_dict", model.config.return_dict) is False
        or model.loss_function is not loss_function
        or type(head) is not nn.Linear
        or head._forward_hooks
        or head._forward_pre_hooks
    ):
        return forward(*args, **kwargs)
    return _without_logits(_run_without_logits(model, forward, head, shift, *args, **kwargs))


def _run_without_logits(
    model: Any, forward: Callable[..., Any], head: nn.Linear, shift: bool, *args: Any, **kwargs: Any
) -> Any:
    """Runs the model's own forward; its output layer passes the hidden states on to the loss."""
    loss = functools.partial(_chunked_loss, head.weight, shift)
    with _swapped(head, "forward", lambda hidden: hidden), _swapped(model, "_loss_function", loss):
        return forward(*args, **kwargs)


def _without_logits(output: Any) -> Any:
    """The same output, whose ``logits``, which were never made, raise when they are read."""
    return _output_without_logits(type(output))(output)


@functools.cache
def _output_without_logits(kind: type[Any]) -> type[Any]:
    def no_logits(_: Any) -> None:
        raise RuntimeError(
            f"{kind.__name__}.logits: patch(linear_cross_entropy=True) makes none of a batch with "
            "labels under grad: call the model under torch.no_grad(), or without labels"
        )

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # accelerate, DataParallel and pytrees build it again; the class's own init reads logits.
        values = dict(kind(*args, **kwargs))
        values.pop("logits", None)
        OrderedDict.__init__(self, values)
        vars(self).update({name: values.get(name) for name in fields})

    def item(self: Any, key: Any) -> Any:
        if key == 0:
            return self.loss
        if isinstance(key, str) and key != "logits":
            return kind.__getitem__(self, key)
        return no_logits(self)

    # FSDP reads all fields of an output.
    fields = {name: x for name, x in kind.__dataclass_fields__.items() if name != "logits"}
    methods = {
        "__dataclass_fields__": fields,
        "__init__": init,
        "__getitem__": item,
        "to_tuple": no_logits,
        "logits": property(no_logits),
    }
    return type(kind.__name__, (kind,), methods)


def _chunked_loss(
    weight: Tensor,
    shift: bool,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Computes transformers' ForCausalLMLoss or ForMaskedLMLoss; ``logits`` are hidden states."""
    if shift_labels is not None:
        labels = shift_labels
    elif shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels = labels.flatten().to(logits.device)
    loss = losses.caption_loss(logits.flatten(0, -2), weight, labels, ignore_index)
    if num_items_in_batch is None:
        return loss
    return loss * (labels != ignore_index).sum() / num_items_in_batch


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an instance attribute for the duration."""
    before = {key: owner.__dict__[key] for key in (name,) if key in owner.__dict__}
    owner.__dict__[name] = value
    try:
        yield
    finally:
        del owner.__dict__[name]
        owner.__dict__.update(before)


@torch.no_grad()
def _loss_obstacle(model: Any, shift: bool) -> str | None:
    """Says why the loss must stay the model's own; None if eight tokens give the same one."""
    head = model.get_output_embeddings()
    try:
        ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        inputs = {"input_ids": ids, "labels": ids}
        with evaluating(model):
            expected = model(**inputs).loss
            loss = _run_without_logits(model, model.forward, head, shift, **inputs).loss
    except Exception as error:  # whatever its code raises
        return f"raises {one_line(error)}"
    difference = float((loss - expected).abs() / expected)
    if not difference <= third_party_layers.TOLERANCE:
        return f"the loss differs by {difference:.1e} on eight tokens"
    return None
