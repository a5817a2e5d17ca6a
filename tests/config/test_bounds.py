"""Values that make no sense are refused by name, however they are given."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Literal

import pytest

from slap_fast.config import TrainConfig, override, slap_tiny
from slap_fast.config.bounds import Bounds, check_value, type_hints


def fields(kind, path=""):
    for name, hint in type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{path}{name}.")
        else:
            yield f"{path}{name}", hint


def numbers_of(hint):
    """The numbers that a hint allows, as (type, bounds) each; bounds None where it has none."""
    if typing.get_origin(hint) is Annotated:
        yield hint.__origin__, next(x for x in hint.__metadata__ if isinstance(x, Bounds))
    elif hint in (int, float):
        yield hint, None
    elif typing.get_origin(hint) is not Literal:
        for part in typing.get_args(hint):
            yield from numbers_of(part)


NUMBERS = {name: pair for name, hint in fields(TrainConfig) for pair in numbers_of(hint)}


def test_every_number_has_bounds():
    assert len(NUMBERS) > 55
    assert not [name for name, (_, bounds) in NUMBERS.items() if bounds is None]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_value_past_a_bound_is_refused_by_the_name_that_set_takes(name):
    kind, bounds = NUMBERS[name]
    wrong = [float("nan"), float("inf"), True]
    wrong += [0.5] if kind is int else []
    wrong += [bounds.above, bounds.below]
    wrong += [None if x is None else x - 1 for x in (bounds.at_least,)]
    wrong += [None if x is None else x + 1 for x in (bounds.at_most,)]
    for value in wrong:
        if value is None:
            continue
        pair = f"{value},{value}" if name == "betas" else value
        with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
            override(slap_tiny(), {name: pair})


CASES = {
    "clip_grad_norm=0": "clip_grad_norm: found 0.0, expected a number above 0",
    "clip_grad_norm=-1": "clip_grad_norm: found -1.0, expected a number above 0",
    "warmup_steps=-1": "warmup_steps: found -1, expected a whole number at least 0",
    "weight_decay=-0.1": "weight_decay: found -0.1",
    "lr_final=1": "lr_final: found 1.0, expected at most lr 0.0012",
    "model.ssl.student_temperature=0": "model.ssl.student_temperature: found 0.0",
    "model.audio.num_heads=0": "model.audio.num_heads: found 0",
    "model.text.num_heads=3": "model.text.hidden_size: found 128, expected a multiple of 2 x",
    "warmup_steps=361": "warmup_steps: found 361, expected at most steps 360",
    "batch_size=1": "batch_size: found 1, expected at least 2: the contrastive loss",
    "seed=-1": "seed: found -1",
    "model.logit_scale=101": "model.logit_scale: found 101.0, expected at most model.logit_scale_",
    "data.min_seconds=30": "data.min_seconds, data.max_seconds",
    "model.mel.f_max=9000": "model.mel.f_min, model.mel.f_max",
}


@pytest.mark.parametrize("setting", CASES)
def test_the_command_line_and_python_refuse_alike(setting):
    key, _, value = setting.partition("=")
    with pytest.raises(ValueError) as from_text:
        override(slap_tiny(), {key: value})
    assert CASES[setting] in str(from_text.value)
    config, *sections = slap_tiny(), *key.split(".")[:-1]
    for section in sections:
        config = getattr(config, section)
    number = float(value) if "." in value else int(value)
    if not isinstance(getattr(config, key.rpartition(".")[2]), int):
        number = float(number)
    with pytest.raises(ValueError) as from_number:
        override(slap_tiny(), {key: number})
    assert str(from_number.value) == str(from_text.value)


def test_what_makes_sense_is_taken():
    config = override(slap_tiny(), {"batch_size": 1, "loss.contrastive": 0, "lr_final": 1.2e-3})
    assert config.batch_size == 1
    assert override(slap_tiny(), {"data.min_seconds": 0.001, "eval_every": 0, "lr": 1e30})


def test_bounds_are_words_and_limits():
    half_open = Bounds(above=0, at_most=1)
    assert str(half_open) == "a number above 0, at most 1"
    assert 1 in half_open and 0.5 in half_open
    assert not any(x in half_open for x in (0, 1.5, float("nan"), float("inf"), -1))
    with pytest.raises(ValueError, match="^x: found 2, expected a number above 0, at most 1$"):
        check_value(Annotated[float, half_open], 2, "x")
