"""The folder of an attack, and file contents that run code or fill memory if trusted."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

from slap_fast.data.manifest import read_manifest
from slap_fast.data.shards.writer import write_shards

CANARY = "CANARY"
"""Placeholder in texts for the path of ``Place.canary``."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder of an attack."""

    root: Path
    """The attack may write here and below."""
    canary: Path
    """A file outside ``root``, which an attack that works creates."""

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def clip(self, name: str = "good.wav") -> Path:
        noise = np.random.default_rng(0).normal(0, 0.1, 8_000)
        soundfile.write(self.root / name, noise, 16_000)
        return self.root / name

    def shards(self) -> Path:
        """Creates intact shards of two clips."""
        self.clip("a.wav"), self.clip("b.flac")
        rows = '{"path": "a.wav", "caption": "a"}\n{"path": "b.flac", "caption": "b"}\n'
        out = self.root / "set"
        write_shards(read_manifest(self.file("m.jsonl", rows)), out)
        return out


class Evil:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def pickled(place: Place) -> bytes:
    return pickle.dumps(Evil(place.canary))


def torch_zip(place: Place) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": Evil(place.canary)}, file)
    return file.getvalue()


def object_array(place: Place) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Evil(place.canary)], dtype=object), allow_pickle=True)
    return file.getvalue()


def yaml_object(place: Place) -> bytes:
    return f"!!python/object/apply:os.system ['touch {place.canary}']".encode()


def gzip_bomb(place: Place) -> bytes:
    return gzip.compress(bytes(20_000_000))


def zip_bomb(place: Place) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("../../CANARY", bytes(20_000_000))
    return file.getvalue()


def deep_json(place: Place) -> bytes:
    return b'{"a":' * 200_000


def yaml_text(text: str) -> Callable[[Place], bytes]:
    return lambda place: text.replace(CANARY, str(place.canary)).encode()
