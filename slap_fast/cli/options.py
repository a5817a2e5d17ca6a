"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from slap_fast.config.bounds import check_value, type_hints

if TYPE_CHECKING:
    import torch

    from slap_fast.config import TrainConfig
    from slap_fast.inference.audio_text import AudioTextModel

PATHS_HELP = (
    "Audio files; folders of them, or of shards; manifests (.csv, .jsonl); .txt files with a path "
    "on each line, or - for one on standard input."
)
Paths = Annotated[Positional[tuple[Path, ...]], arg(help=PATHS_HELP)]
ModelFolder = Annotated[Path, arg(help="A model's folder, or a run's: its best checkpoint.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], arg(help="Where to run.")]
CONFIG_HELP = "A recipe (tiny, base) or a YAML file: base: tiny, then settings (docs/settings.md)."
Config = Annotated[str, arg(help=CONFIG_HELP)]
SETTINGS_HELP = "Any other setting by its dotted name, such as steps=500 or loss.ssl=0; repeatable."
Settings = Annotated[
    UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE", help=SETTINGS_HELP)
]


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and where it runs."""

    model: str
    """A model's folder, a run's (its best checkpoint), or a hub id: slap-fast, CLAP, PE-AV, or a
    sentence-transformers model that takes audio."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    local_files_only: bool = False
    """Of a hub id, only what was downloaded before."""
    device: Device = "auto"
    """Where to run."""

    def load(self) -> AudioTextModel:
        """Loads it. Raises ValueError, which names what is wrong."""
        from slap_fast.interop.pretrained.load import load

        return load(
            self.model,
            device=torch_device(self.device),
            revision=self.revision,
            local_files_only=self.local_files_only,
        )


def within_bounds(command: Callable[..., int]) -> Callable[..., int]:
    """The command, which first holds every option to the bounds in its type hint."""

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> int:
        hints = type_hints(command)
        for name, value in inspect.signature(command).bind(*args, **kwargs).arguments.items():
            check_value(hints[name], value, f"--{name.replace('_', '-')}")
        return command(*args, **kwargs)

    return checked


Model = OmitArgPrefixes[ModelChoice]


def load_recipe(
    name: str, changes: dict[str, Any] | None = None, *, quiet: bool = False
) -> TrainConfig:
    """Returns the config of a recipe or of a YAML file, with changes by dotted name.

    Settings that followed a changed one are listed on stderr, unless ``quiet``. Raises ValueError
    where ``name`` is neither, or a setting is wrong.
    """
    from slap_fast.config import RECIPES, TrainConfig, derived, override

    recipe, settings = read_settings(name)
    settings |= changes or {}
    before = TrainConfig() if recipe is None else RECIPES[recipe]()
    config = override(before, settings)
    if not quiet and os.environ.get("RANK", "0") == "0":
        if recipe is None:
            note = "names no base, so what it leaves out is the paper's; base: tiny starts small"
            print(f"{name}: {note}", file=sys.stderr)
        if followed := derived(before, settings, config):
            values = ", ".join(f"{key}={value}" for key, value in followed.items())
            print(f"settings that follow what was set: {values}", file=sys.stderr)
    return config


def read_settings(name: str, readers: tuple[Path, ...] = ()) -> tuple[str | None, dict[str, Any]]:
    """Returns the recipe that a recipe's name or a YAML file starts from, and what it changes.

    A file's ``base`` is a recipe or another file, relative to its folder; None without one.
    ``readers`` are the files that led here. Raises ValueError as :func:`load_recipe` does.
    """
    import yaml

    from slap_fast.config import RECIPES, TrainConfig, by_name

    if name in RECIPES:
        return name, {}
    path = readers[-1].parent / name if readers else Path(name)
    origin = f"{readers[-1]}: base" if readers else "--config"
    if not path.is_file():
        expected = f"one of {', '.join(RECIPES)} or a YAML file"
        raise ValueError(f"{origin}: found {name!r}, expected {expected}")
    if path.resolve() in [reader.resolve() for reader in readers]:
        raise ValueError(f"{origin}: found {name!r}, which starts from this file itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found {values!r}, expected settings, such as steps: 500")
    base = values.pop("base", None)
    try:
        own = by_name(TrainConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if base is None:
        return None, own
    recipe, settings = read_settings(str(base), (*readers, path))
    return recipe, settings | own


def config_text(config: TrainConfig) -> str:
    """Returns all settings as a YAML file that ``--config`` takes; its base then adds nothing."""
    import yaml

    from slap_fast.config import to_dict

    return "base: tiny\n" + yaml.safe_dump(to_dict(config), sort_keys=False)


def parse_setting(text: str) -> tuple[str, str]:
    """Splits ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set: found {text!r}, expected KEY=VALUE, such as loss.ssl=0")
    return key.strip(), value.strip()


def torch_device(name: Device) -> torch.device:
    """Returns the device of that name, or the best one for "auto"."""
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has[name]:
        raise ValueError(f"--device: {name} is not available here; slap-fast doctor says what is")
    return torch.device(name)
