"""``slap_fast.patch(model)``: slow parts of a third-party model on slap-fast's operations.

One instance is changed, never a class: parameters, state dict, hooks and types stay. A part is
replaced only if the model, or the layer alone, gives the same numbers and gradients on random
input. The report lists what was changed, what was not, and why; ``undo()`` restores the model.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slap_fast.interop import patched_loss, third_party_layers, unpadding
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


def _set_forward(module: nn.Module, forward: Callable[..., Any], report: PatchReport) -> None:
    # The signature stays: transformers' Trainer reads it.
    module.forward = functools.update_wrapper(forward, module.forward)
    report._undo.append(functools.partial(module.__dict__.pop, "forward"))


def _patch_attention(model: nn.Module, report: PatchReport, unpad: bool) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            report._note("attention", name, module, "torch's own is not replaced", "")
    transformers = sys.modules.get("transformers")
    if transformers is None:  # never imported, so the model is none of its
        return
    hf_attention.register()
    _copy_configs(model, report)
    for root_name, root in _roots(model):
        probe: Probe | None = None
        changed: list[nn.Module] = []
        for group, parts in _attention_groups(root, root_name):
            how = f"packed attention for transformers' {group.config._attn_implementation}"
            obstacle = _attention_obstacle(group)
            if obstacle is None:
                probe = probe or Probe(root, [part for _, part in parts])
                obstacle = _switch(root, group, probe)
            for part_name, part in parts:
                report._note("attention", part_name, part, obstacle, how)
            changed += [part for _, part in parts] if obstacle is None else []
        if unpad and probe is not None:
            _unpad(root, root_name, changed, probe, report)


def _unpad(
    root: Any, root_name: str, attentions: list[nn.Module], probe: Probe, report: PatchReport
) -> None:
    for name, blocks in unpadding.block_lists(root, attentions):
        for pairs in (False, True):
            handles = unpadding.install(root, name, blocks, pairs=pairs)
            with unpadding.recorded() as seen:
                obstacle = probe.obstacle()
            if obstacle is None and blocks[-1] not in seen:
                obstacle = "nothing to unpad: no mask of padding reaches its blocks"
            if obstacle is None:
                report._undo += [handle.remove for handle in handles]
                break
            for handle in handles:
                handle.remove()
        path = f"{root_name}.{name}" if root_name else name
        how = f"{len(blocks)} block{'s' * (len(blocks) > 1)} on the real tokens alone"
        report._note("unpad", path, blocks[0], obstacle, how)


def _copy_configs(model: nn.Module, report: PatchReport) -> None:
    """Gives a model configs of its own, which other models may share."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, sys.modules["transformers"].PreTrainedConfig):
            module.config = copy.deepcopy(config, copies)
            report._undo.append(functools.partial(setattr, module, "config", config))


def _roots(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The transformers models in a module that are in no other, with their paths."""
    kind = sys.modules["transformers"].PreTrainedModel
    roots: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, kind) and not any(_is_in(name, root) for root in roots):
            roots.append(name)
            yield name, module


def _is_in(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _attention_groups(
    root: Any, root_name: str
) -> Iterator[tuple[Any, list[tuple[str, nn.Module]]]]:
    """Parts of a model that share a config, and so an attention: (the model of it, its attention
    modules by path)."""
    seen: set[int] = set()
    for module in root.modules():
        if not isinstance(module, sys.modules["transformers"].PreTrainedModel):
            continue
        if id(module.config) in seen:
            continue
        seen.add(id(module.config))
        prefix = f"{root_name}." if root_name else ""
        parts = [
            (prefix + name, child)
            for name, child in root.named_modules()
            if type(child).__name__.endswith("Attention")
            and getattr(child, "config", module.config) is module.config
            and any(child is own for own in module.modules())
        ]
        if parts:
            yield module, parts


def _switch(root: Any, group: Any, probe: Probe) -> str | None:
    """Sets a group's attention to ours and keeps it only if the model's numbers stay; else says why
    not."""
    configs = [m.config for m in root.modules() if "config" in m.__dict__]
    before = [config._attn_implementation_internal for config in configs]
    try:
        group.set_attn_implementation({"": hf_attention.NAME})
        with hf_attention.recorded() as reached:
            obstacle = probe.obstacle()
        if obstacle is None and not reached:
            obstacle = "no call reaches packed attention"
    except Exception as error:  # whatever its code raises
        obstacle = f"raises {one_line(error)}"
    if obstacle is not None:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
    return obstacle


def _attention_obstacle(module: Any) -> str | None:
    if not module._can_set_attn_implementation():
        return "it computes its attention itself, not through transformers' interface"
    return unready(module)


def _patch_layers(model: nn.Module, options: list[str], report: PatchReport) -> None:
    for name, module in model.named_modules():
        for candidate in third_party_layers.candidates(module):
            if candidate.option in options:
                obstacle = third_party_layers.obstacle(module, candidate)
                report._note(candidate.option, name, module, obstacle, candidate.description)
                if obstacle is None:
                    _set_forward(module, candidate.forward, report)


def _patch_loss(model: Any, report: PatchReport) -> None:
    candidate = patched_loss.candidate(model)
    if candidate is None:
        return
    obstacle, forward = candidate
    report._note("linear_cross_entropy", "", model, obstacle, "loss in chunks, no logits kept")
    if forward is not None:
        _set_forward(model, forward, report)
