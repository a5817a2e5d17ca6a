"""``slap_fast.patch(model)``: slow parts of a third-party model on slap-fast's operations.

One instance is changed, never its class: parameters, state dict and hooks stay, and copies, pickles
and replicas of the model are patched as it is. A part is replaced only if the model, or the layer
alone, gives the same numbers and gradients on random input. The report lists what was changed, what
was not, and why; ``undo()`` restores the model.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slap_fast.interop import (
    attention_config,
    patched_loss,
    replaced_forward,
    third_party_layers,
    unpadding,
)
from slap_fast.interop.probe import Probe, one_line, unready
from slap_fast.models import hf_attention


@dataclass(frozen=True)
class Change:
    """The outcome for one part of the model."""

    option: str
    """attention, unpad, rms_norm, swiglu or linear_cross_entropy."""
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
        """Restores what was changed, exactly, and keeps what changed since; in any order with
        other reports of the model. A second call does nothing."""
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
    unpad: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    linear_cross_entropy: bool = True,
) -> PatchReport:
    """Moves what it can of one model to slap-fast's operations.

    Args:
        model: a transformers or timm style model, or any module that holds one.
        attention: transformers' attention interface: padded batches are unpadded inside, and
            ``cu_seq_lens_q`` batches stay packed.
        unpad: the blocks around that attention run on the real tokens of a padded batch alone, in
            calls that ask for no inner states and have no cache; their number is read back from the
            device. What comes out of padding is 0.
        rms_norm: RMSNorm modules, on one fused operation.
        swiglu: SwiGLU modules, with one stored activation less.
        linear_cross_entropy: the loss of ``labels``, without the logits, which raise when they are
            read. Without gradients, as in an evaluation, the model's own forward runs.

    Returns:
        The report: print it, and ``undo()`` it. Whatever the model's code raises, nothing is raised
        here, and no part is left half changed.
    """
    options = {"attention": attention, "rms_norm": rms_norm, "swiglu": swiglu}
    report = PatchReport()
    try:
        if attention:
            _patch_attention(model, report, unpad)
        _patch_layers(model, [option for option, wanted in options.items() if wanted], report)
        if linear_cross_entropy:
            _patch_loss(model, report)
    except Exception as error:  # whatever its code raises: a model is patched right or not at all
        report.undo()
        report.changes.clear()
        report._note("patch", "", model, f"raised {one_line(error)}", "")
    return report


def _set_forward(module: nn.Module, report: PatchReport, *function: Any) -> None:
    replaced_forward.replace(module, *function)
    report._undo.append(functools.partial(replaced_forward.restore, module))


def _patch_attention(model: nn.Module, report: PatchReport, unpad: bool) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            report._note("attention", name, module, "torch's own is not replaced", "")
    transformers = sys.modules.get("transformers")
    if transformers is None:  # never imported, so the model is none of its
        return
    hf_attention.register()
    give_back = attention_config.own_configs(model)
    report._undo.append(give_back)
    for root_name, root in _roots(model):
        probe: Probe | None = None
        changed: list[nn.Module] = []
        for group, parts in _attention_groups(root):
            how = f"packed attention for transformers' {group.config._attn_implementation}"
            obstacle = _attention_obstacle(group)
            reached: list[nn.Module] = []
            if obstacle is None:
                probe = probe or Probe(root, parts)
                obstacle, reached = _switch(root, group, probe, changed, report)
            changed += reached
            for name, part in root.named_modules():
                path = _joined(root_name, name)
                if part in reached:
                    report._note("attention", path, part, None, how)
                elif part in parts and not _overlaps(part, reached):
                    why = obstacle or "no call reaches packed attention"
                    report._note("attention", path, part, why, "")
        if unpad and changed:
            _unpad(root, root_name, changed, probe, report)
    if not report.changed("attention"):
        give_back()


def _unpad(
    root: Any, root_name: str, attentions: list[nn.Module], probe: Probe, report: PatchReport
) -> None:
    for name, blocks in unpadding.block_lists(root, attentions):
        for pairs in (False, True):
            handles = unpadding.install(root, name, blocks, pairs=pairs)
            report._undo += [handle.remove for handle in handles]
            with unpadding.recorded() as seen:
                obstacle = probe.obstacle()
            if obstacle is None and blocks[-1] not in seen:
                obstacle = "nothing to unpad: no mask of padding reaches its blocks"
            if obstacle is None:
                break
            for handle in handles:
                handle.remove()
        how = f"{len(blocks)} block{'s' * (len(blocks) > 1)} on the real tokens alone"
        report._note("unpad", _joined(root_name, name), blocks[0], obstacle, how)


def _roots(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The transformers models in a module that are in no other, with their paths."""
    roots: list[str] = []
    for name, module in model.named_modules():
        inside = any(_is_in(name, root) for root in roots)
        if isinstance(module, _pretrained_model()) and not inside:
            roots.append(name)
            yield name, module


def _pretrained_model() -> Any:
    return sys.modules["transformers"].PreTrainedModel


def _is_in(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _joined(root_name: str, name: str) -> str:
    return ".".join(filter(None, (root_name, name)))


def _attention_groups(root: Any) -> Iterator[tuple[Any, list[nn.Module]]]:
    """Parts of a model that share a config, and so an attention: (the model of it, its attention
    modules by the names of their classes)."""
    models = [m for m in root.modules() if isinstance(m, _pretrained_model())]
    config_of = {part: model.config for model in models for part in model.modules()}
    seen: set[int] = set()
    for model in models:
        if id(model.config) in seen:
            continue
        seen.add(id(model.config))
        parts = [
            part
            for part, config in config_of.items()
            if type(part).__name__.endswith("Attention")
            and not isinstance(part, nn.MultiheadAttention)
            and getattr(part, "config", config) is model.config
        ]
        wrappers = [part for part in parts if len(set(part.modules()) & set(parts)) > 1]
        if parts:
            yield model, [part for part in parts if part not in wrappers]


def _overlaps(part: nn.Module, others: list[nn.Module]) -> bool:
    """Whether one is in another."""
    return any(part in other.modules() or other in part.modules() for other in others)


def _switch(
    root: Any, group: Any, probe: Probe, known: list[nn.Module], report: PatchReport
) -> tuple[str | None, list[nn.Module]]:
    """Sets a group's attention to ours and keeps it only if the model's numbers stay.

    Returns why not, and the modules whose calls are ours now, beside the ``known``.
    """
    try:
        restore = attention_config.set_packed(root, group)
    except Exception as error:  # whatever its code raises
        return f"raises {one_line(error)}", []
    try:
        with hf_attention.recorded() as calls:
            obstacle = probe.obstacle()
    except Exception as error:  # whatever its code raises
        obstacle = f"raises {one_line(error)}"
    reached = [module for module in dict.fromkeys(calls) if module not in known]
    if obstacle is None and not reached:
        obstacle = "no call reaches packed attention"
    if obstacle is not None:
        restore()
        return obstacle, []
    report._undo.append(restore)
    return None, reached


def _attention_obstacle(module: Any) -> str | None:
    if not module._can_set_attn_implementation():
        return "it computes its attention itself, not through transformers' interface"
    if module.config._attn_implementation == hf_attention.NAME:
        return "runs on packed attention already"
    return unready(module)


def _patch_layers(model: nn.Module, options: list[str], report: PatchReport) -> None:
    known = {change.name for change in report.changes if change.option == "attention"}
    for name, module in model.named_modules():
        for candidate in third_party_layers.candidates(module):
            if candidate.option in options and not (
                candidate.option == "attention" and name in known
            ):
                obstacle = third_party_layers.obstacle(module, candidate)
                report._note(candidate.option, name, module, obstacle, candidate.description)
                if obstacle is None:
                    _set_forward(module, report, candidate.forward, *candidate.args)


def _patch_loss(model: Any, report: PatchReport) -> None:
    candidate = patched_loss.candidate(model)
    if candidate is None:
        return
    obstacle, function = candidate
    report._note("linear_cross_entropy", "", model, obstacle, "loss in chunks, no logits kept")
    if obstacle is None:
        _set_forward(model, report, *function)
