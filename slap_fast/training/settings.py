"""Settings of a run that goes on, or that starts from a model's weights: each acts or is refused.

Settings are named by dotted keys, such as ``model.ssl.mask_ratio``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slap_fast.config import ModelConfig, TrainConfig, override, to_dict
from slap_fast.models.slap import SlapModel
from slap_fast.training.schedules import learning_rate

ON_RESUME = (
    "steps", "lr", "lr_final", "clip_grad_norm", "max_tokens", "precision", "compile", "ranks",
    "saving", "log_every", "eval_every", "save_every", "max_skipped_steps", "data.max_bad_share",
    "data.cache_gb",
)  # fmt: skip
"""What a run may change when it goes on: none of them changes its clips or the model's function."""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a config, or of a mapping as deep, by dotted key."""
    values = config if isinstance(config, Mapping) else to_dict(config)
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def changed(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """(old, new) of each setting in which two configs differ, by dotted key."""
    old, new = flat(before), flat(after)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}


def resumed(stored: TrainConfig, given: Mapping[str, Any], step: int) -> TrainConfig:
    """The config of a run that goes on at ``step`` with the settings ``given`` to it.

    Raises ValueError for one that a run cannot change, and for fewer steps than are done.
    """
    text = "model.text."
    if stored.model.text.pretrained == given.get(f"{text}pretrained", ""):
        own = (f"{text}pretrained", f"{text}max_tokens")  # the checkpoint has its other sizes
        given = {k: v for k, v in given.items() if not k.startswith(text) or k in own}
    config = override(stored, dict(given))
    for key, (old, new) in changed(stored, config).items():
        if key not in ON_RESUME:
            raise ValueError(
                f"{key}: found {new!r}, expected {old!r}, which the run was started with; --resume "
                f"may change {', '.join(ON_RESUME)}"
            )
    if config.steps < step:
        raise ValueError(f"steps: found {config.steps}, expected at least {step}, which are done")
    return config


def describe_changes(stored: TrainConfig, config: TrainConfig, step: int) -> list[str]:
    """A line for each setting that a resumed run changes; after more steps one on the schedule."""
    changes = changed(stored, config)
    lines = [f"{key}: {old} before, {new} from here on" for key, (old, new) in changes.items()]
    if "steps" in changes:
        # At the end of a run the schedule is past its last step.
        rates = [learning_rate(c, min(step, c.steps)) for c in (stored, config)]
        lines.append(
            f"schedules span all {config.steps} steps: at step {step} the learning rate goes from "
            f"{rates[0]:.3g} to {rates[1]:.3g}, then to {config.lr_final:.3g} at the last step"
        )
    return lines


def with_settings(model: SlapModel, given: Mapping[str, Any]) -> SlapModel:
    """A model's weights under the settings ``given``, by dotted key below ``model.``.

    Raises ValueError for a setting that its tensors forbid, with the first one that does.
    """
    try:
        config = override(model.config, dict(given))
    except ValueError as error:
        names = ", ".join(f"model.{key}" for key in given)
        raise ValueError(f"{names}: cannot be changed in the model of --init: {error}") from None
    differing = changed(model.config, config)
    for key, (old, new) in differing.items():
        if reason := _forbidden_by(model, _only(model.config, config, key)):
            raise ValueError(f"model.{key}: found {new!r}, expected {old!r} of --init, {reason}")
    if reason := _forbidden_by(model, config):
        names = ", ".join(f"model.{key}" for key in differing)
        raise ValueError(f"{names}: expected those of --init, {reason}")
    for key in ("logit_scale", "text.pretrained"):
        if key in differing:
            old, new = differing[key]
            raise ValueError(
                f"model.{key}: found {new!r}, expected {old!r}: it is in the weights of --init"
            )
    if not differing:
        return model
    again = SlapModel(config)
    again.load_state_dict(model.state_dict())
    return again


def _only(before: ModelConfig, after: ModelConfig, key: str) -> ModelConfig | None:
    """``before`` with one setting of ``after``; None where the others have to change with it."""
    try:
        return override(before, {key: flat(after)[key]})
    except ValueError:
        return None


def _forbidden_by(model: SlapModel, config: ModelConfig | None) -> str:
    """The first tensor that a model of this config has of another shape; empty where none."""
    if config is None:
        return ""
    with torch.device("meta"):
        wanted = {name: list(x.shape) for name, x in SlapModel(config).state_dict().items()}
    stored = {name: list(x.shape) for name, x in model.state_dict().items()}
    for name in wanted | stored:
        if name not in stored:
            return f"whose weights have no {name}"
        if stored[name] != wanted.get(name):
            return f"whose {name} has shape {stored[name]}, not {wanted.get(name)}"
    return ""
