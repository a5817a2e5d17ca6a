"""A model with random weights and a folder of sounds, for commands that take files."""

import numpy as np
import pytest
import soundfile
import torch

from slap_fast.cli.options import ModelChoice
from slap_fast.config import override, slap_tiny
from slap_fast.inference.slap import Slap
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer


@pytest.fixture(scope="session")
def slap():
    """A model with random weights."""
    torch.manual_seed(0)
    small = {f"model.{tower}.num_layers": 2 for tower in ("audio", "text", "caption")}
    config = override(slap_tiny(), small).model
    return Slap(SlapModel(config), CaptionTokenizer.load(None, 96))


@pytest.fixture(scope="session")
def untrained(slap, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("untrained") / "model"
    slap.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded_once(slap, monkeypatch):
    """Every command gets the same model: loading it would take most of the time."""
    monkeypatch.setattr(ModelChoice, "load", lambda _: slap)


@pytest.fixture
def sounds(tmp_path):
    """Six files of two labels, of which the last two are no audio, and a manifest of them."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["path,caption,label,split"]
    for i in range(6):
        if i < 4:
            soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(4_000), 16_000)
        else:
            (folder / f"{i}.wav").write_text("<html>")
        lines.append(f"{i}.wav,sound {i},{'ab'[i % 2]},{'train' if i in (0, 4) else 'test'}")
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder
