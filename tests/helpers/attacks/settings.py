"""Attacks through recipes, settings on the command line, mixtures and manifests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from slap_fast.cli import main
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.writer import write_shards
from tests.helpers.attacks.place import (
    CANARY,
    Place,
    deep_json,
    gzip_bomb,
    pickled,
    yaml_object,
    yaml_text,
)


def config_file(content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        place.clip()
        manifest = place.file("m.csv", "path,caption\ngood.wav,noise\n")
        path = place.file("evil.yaml", content(place))
        words = ["train", "--data", str(manifest), "--config", str(path), "--workers", "0"]
        main([*words, "--out", str(place.root / "run")])

    return attack


LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


def setting(text: str) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        main(["train", "--out", str(place.root / "run"), "--set", text])

    return attack


def mix(content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    return lambda place: open_source(place.file("mix.yaml", content(place)), None, fallback="train")


def path_in_manifest(path: str) -> Callable[[Place], None]:
    """Reads a manifest with this path and writes shards from it."""

    def attack(place: Place) -> None:
        place.clip()
        target = path.replace(CANARY, str(place.canary))
        rows = [{"path": target, "caption": "a"}, {"path": "good.wav", "caption": "b"}]
        manifest = place.file("m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        source = open_source(manifest, None, fallback="train")
        with pytest.raises(AudioError):
            source.audio(0)
        write_shards(source.rows, place.root / "set")

    return attack


def manifest(name: str, content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    return lambda place: read_manifest(place.file(name, content(place)))


def pipe_in_manifest(place: Place) -> None:
    os.mkfifo(place.root / "pipe.wav")
    path_in_manifest("pipe.wav")(place)


def link_in_manifest(place: Place) -> None:
    (place.root / "link.wav").symlink_to("/etc/passwd")
    path_in_manifest("link.wav")(place)


def split_that_climbs(place: Place) -> None:
    place.clip()
    row = {"path": "good.wav", "caption": "a", "split": f"../../{CANARY}"}
    write_shards(read_manifest(place.file("m.jsonl", json.dumps(row))), place.root / "x" / "set")


ATTACKS: dict[str, Callable[[Place], None]] = {
    "yaml_object": config_file(yaml_object),
    "yaml_name": config_file(yaml_text("steps: !!python/name:os.system")),
    "yaml_module": config_file(yaml_text("steps: !!python/module:antigravity")),
    "yaml_new": config_file(yaml_text("!!python/object/new:os.system [touch CANARY]")),
    "yaml_laughs": config_file(yaml_text(LAUGHS)),
    "yaml_pickle": config_file(pickled),
    "yaml_deep": config_file(lambda place: b"[" * 100_000),
    "set_dunder": setting("model.__class__.__init__=1"),
    "set_code": setting("steps=__import__('os').system('touch CANARY')"),
    "mix_object": mix(yaml_object),
    "mix_pipe": mix(yaml_text("- data: 'pipe:touch CANARY'")),
    "path_pipe": path_in_manifest(f"pipe:touch {CANARY}"),
    "path_bar": path_in_manifest(f"| touch {CANARY}"),
    "path_command": path_in_manifest(f"$(touch {CANARY}).wav"),
    "path_semicolon": path_in_manifest(f"a.wav; touch {CANARY}"),
    "path_url": path_in_manifest("http://127.0.0.1:9/a.wav"),
    "path_file_url": path_in_manifest("file:///etc/passwd"),
    "path_passwd": path_in_manifest("/etc/passwd"),
    "path_climbs": path_in_manifest("../../../../../../etc/passwd"),
    "path_zero": path_in_manifest("/dev/zero"),
    "path_stdin": path_in_manifest("/dev/stdin"),
    "path_fifo": pipe_in_manifest,
    "path_link": link_in_manifest,
    "split_climbs": split_that_climbs,
    "manifest_pickle": manifest("m.jsonl", pickled),
    "manifest_gzip_bomb": manifest("m.csv", gzip_bomb),
    "manifest_deep": manifest("m.jsonl", deep_json),
}  # fmt: skip
