"""``slap_fast.patch(model)``: slow parts of a third-party model on slap-fast's operations.

One instance is changed, never a class: parameters, state dict, hooks and types stay. Only known
parts are replaced, and a part that can run alone only if it gives the same numbers on a random
input. The report lists what was changed, what was not, and why; ``undo()`` restores the model.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slap_fast import losses
from slap_fast.interop import third_party_layers
from slap_fast.models import hf_attention


@dataclass(frozen=True)
class Change:
    """The outcome for one part of the model."""

    option: str
    """attention, rms_norm, swiglu or linear_cross_entropy."""
    name: str
    """The module's path in the model."""
    kind: str
    """Its class."""
    changed: bool
    """Whether it runs on slap-fast now."""
    why: str
    """What runs now, or why nothing changed."""


@dataclass
class PatchReport:
    """What :func:`patch` did; printable and reversible."""

    changes: list[Change] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restores the model exactly as it was before; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def changed(self, option: str) -> int:
        """Counts the parts that an option changed."""
        return sum(change.changed for change in self.changes if change.option == option)

    def __str__(self) -> str:
        """A table with one line for all equal parts."""
        counts: Counter[tuple[str, ...]] = Counter()
        for c in self.changes:
            counts[c.option, "yes" if c.changed else "no", c.kind, c.why] += 1
        lines = [("option", "changed", "parts", "how, or why not")]
        lines += [(o, yes, f"{n} x {kind}", why) for (o, yes, kind, why), n in counts.items()]
        w = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(f"{o:{w[0]}}  {c:{w[1]}}  {p:{w[2]}}  {why}" for o, c, p, why in lines)

    def _note(self, option: str, name: str, module: Any, obstacle: str | None, how: str) -> None:
        kind = type(module).__name__
        self.changes.append(Change(option, name, kind, obstacle is None, obstacle or how))


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    linear_cross_entropy: bool = True,
) -> PatchReport:
    """Moves what it can of one model to slap-fast's operations.

    Args:
        model: a transformers or timm style model, or any module that holds one.
        attention: transformers' attention interface: padded batches are unpadded inside, and
            ``cu_seq_lens_q`` batches stay packed.
        rms_norm: RMSNorm modules, on one fused operation.
        swiglu: SwiGLU modules, with one stored activation less.
        linear_cross_entropy: the loss of ``labels``, without the logits: of a batch with labels the
            output's ``logits`` is then None.

    Returns:
        The report: print it, and ``undo()`` it.
    """
    options = {"attention": attention, "rms_norm": rms_norm, "swiglu": swiglu}
    report = PatchReport()
    if attention:
        _patch_attention(model, report)
    for name, module in model.named_modules():
        for candidate in third_party_layers.candidates(module):
            if options[candidate.option]:
                obstacle = third_party_layers.obstacle(module, candidate)
                report._note(candidate.option, name, module, obstacle, candidate.description)
                if obstacle is None:
                    _set_forward(module, candidate.forward, report)
    if linear_cross_entropy:
        _patch_loss(model, report)
    return report


def _set_forward(module: nn.Module, forward: Callable[..., Any], report: PatchReport) -> None:
    # The signature stays: transformers' Trainer reads it.
    module.forward = functools.update_wrapper(forward, module.forward)
    report._undo.append(functools.partial(module.__dict__.pop, "forward"))


def _patch_attention(model: nn.Module, report: PatchReport) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            report._note("attention", name, module, "torch's own is not replaced", "")
    transformers = sys.modules.get("transformers")
    if transformers is None:  # never imported, so the model is none of its
        return
    hf_attention.register()
    # A config may be shared with other models: this one gets its own.
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, transformers.PreTrainedConfig):
            module.config = copy.deepcopy(config, copies)
            report._undo.append(functools.partial(setattr, module, "config", config))
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, transformers.PreTrainedModel) or id(module.config) in seen:
            continue
        seen.add(id(module.config))
        parts = [
            child
            for child in module.modules()
            if type(child).__name__.endswith("Attention")
            and getattr(child, "config", module.config) is module.config
        ]
        if not parts:
            continue
        how = f"packed attention for transformers' {module.config._attn_implementation}"
        obstacle = _attention_obstacle(module)
        if obstacle is None:
            module.set_attn_implementation({"": hf_attention.NAME})
            if module.config._attn_implementation != hf_attention.NAME:
                obstacle = "refused it"
        for part in parts:
            report._note("attention", name, part, obstacle, how)


def _attention_obstacle(module: Any) -> str | None:
    if not module._can_set_attn_implementation():
        return "it computes its attention itself, not through transformers' interface"
    for key, value in module.config.to_dict().items():
        if "att" in key and "drop" in key and isinstance(value, float) and value > 0:
            return f"config.{key} is {value}, and packed attention has no dropout"
    return None


def _patch_loss(model: Any, report: PatchReport) -> None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        return
    loss = model.loss_function
    shift = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}.get(loss.__name__)
    obstacle = None
    if shift is None:
        obstacle = f"its loss is {loss.__name__}"
    elif head.bias is not None:
        obstacle = "the output layer has a bias, which the fused loss has not"
    elif "forward" in model.__dict__:
        obstacle = "its forward was replaced before"
    else:
        forward = functools.partial(_loss_without_logits, model, model.forward, head, shift)
        difference = _loss_difference(model, forward)
        if difference > third_party_layers.TOLERANCE:
            obstacle = f"the loss differs by {difference:.1e} on eight tokens"
    report._note("linear_cross_entropy", "", model, obstacle, "loss in chunks, no logits kept")
    if obstacle is None:
        _set_forward(model, forward, report)


def _loss_without_logits(
    model: Any, forward: Callable[..., Any], head: nn.Linear, shift: bool, *args: Any, **kwargs: Any
) -> Any:
    """Runs the model's own forward; with labels, its output layer passes the hidden states on to
    the loss."""
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    if arguments.get("labels") is None:
        return forward(*args, **kwargs)
    loss = functools.partial(_chunked_loss, head.weight, shift)
    with _swapped(head, "forward", lambda hidden: hidden), _swapped(model, "_loss_function", loss):
        out = forward(*args, **{**kwargs, "return_dict": True})
    out.logits = None
    return out if kwargs.get("return_dict", True) else out.to_tuple()


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
def _loss_difference(model: Any, forward: Callable[..., Any]) -> float:
    training = model.training
    model.eval()
    try:
        ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
        expected = model.forward(input_ids=ids, labels=ids).loss
        return float((forward(input_ids=ids, labels=ids).loss - expected).abs() / expected)
    finally:
        model.train(training)
