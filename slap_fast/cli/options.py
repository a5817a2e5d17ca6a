"""Options that several commands share, and what their values mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

if TYPE_CHECKING:
    import torch

    from slap_fast.config import TrainConfig
    from slap_fast.inference.audio_text import AudioTextModel

Paths = Annotated[Positional[tuple[Path, ...]], arg(help="Audio files and folders.")]
ModelFolder = Annotated[Path, arg(help="A model's folder, or a run's: its best checkpoint.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], arg(help="Where to run.")]
Config = Annotated[str, arg(help="A recipe (tiny, base) or a YAML file of settings.")]
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


Model = OmitArgPrefixes[ModelChoice]


def load_recipe(name: str) -> TrainConfig:
    """Returns the config of a recipe or of a YAML file; raises ValueError where it is neither."""
    import yaml

    from slap_fast.config import RECIPES, TrainConfig, from_dict

    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"--config: found {name!r}, expected one of {', '.join(RECIPES)} or a YAML file"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return from_dict(TrainConfig, values)


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
