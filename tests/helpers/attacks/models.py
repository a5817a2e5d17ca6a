"""Attacks through the files of models, runs and pretrained text encoders."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from slap_fast import atomic_files
from slap_fast.checkpoint.format import write_files
from slap_fast.checkpoint.model import model_files
from slap_fast.cli import main
from slap_fast.config import TextEncoderConfig, override, slap_tiny
from slap_fast.inference.slap import Slap
from slap_fast.models.slap import SlapModel
from slap_fast.models.text_encoder import TextEncoder, modernbert_config, resolve_pretrained
from slap_fast.models.tokenizer import CaptionTokenizer
from tests.helpers.attacks.place import (
    CANARY,
    Place,
    deep_json,
    gzip_bomb,
    object_array,
    pickled,
    torch_zip,
    yaml_object,
)

SMALL = {
    "audio.hidden_size": 32, "audio.num_heads": 2, "audio.intermediate_size": 32,
    "audio.num_layers": 1, "text.hidden_size": 32, "text.num_heads": 2, "text.num_layers": 1,
    "text.intermediate_size": 32, "caption.hidden_size": 32, "caption.num_heads": 2,
    "caption.num_layers": 1, "ssl.prototypes": 16,
}  # fmt: skip


def model_folder(place: Place) -> Path:
    config = override(slap_tiny().model, SMALL)
    folder = place.root / "model"
    folder.mkdir()
    words = CaptionTokenizer.load(None, 96)
    write_files(folder, model_files(SlapModel(config), words, {}))
    return folder


def load_sealed(folder: Path) -> None:
    """Loads a folder whose checksums the attacker has updated."""
    atomic_files.write_manifest(folder)
    Slap.from_pretrained(folder)


def in_model(name: str, content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        folder = model_folder(place)
        (folder / name).write_bytes(content(place))
        load_sealed(folder)

    return attack


def safetensors(header: bytes, size: int | None = None) -> Callable[[Place], bytes]:
    return lambda place: struct.pack("<Q", len(header) if size is None else size) + header


def pickle_beside_no_weights(place: Place) -> None:
    folder = model_folder(place)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt"):
        (folder / name).write_bytes(torch_zip(place))
    load_sealed(folder)


def code_beside_the_model(place: Place) -> None:
    folder = model_folder(place)
    evil_module(place, folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["auto_map"] = {"AutoModel": "modeling_evil.Evil"}
    stored["model"]["auto_map"] = stored["auto_map"]
    (folder / "config.json").write_text(json.dumps(stored))
    load_sealed(folder)


def evil_module(place: Place, folder: Path) -> None:
    code = f"import os\nos.system('touch {place.canary}')\nclass Evil: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py"):
        (folder / name).write_text(code)


def model_named(name: str) -> Callable[[Place], None]:
    return lambda place: Slap.from_pretrained(name.replace(CANARY, str(place.canary)))


def run_json(content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        place.file("run/run.json", content(place))
        main(["train", "--out", str(place.root / "run"), "--resume", "--workers", "0"])

    return attack


TOWER = TextEncoderConfig(
    vocab_size=60, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=40
)


def tower(
    files: dict[str, Callable[[Place], bytes]] | None = None, **keys: object
) -> Callable[[Place], None]:
    """Loads a text tower with these keys added to its config, or these files replaced."""

    def attack(place: Place) -> None:
        folder = place.root / "tower"
        folder.mkdir()
        evil_module(place, folder)
        stored = modernbert_config(TOWER).to_dict() | keys
        (folder / "config.json").write_text(json.dumps(stored, default=str))
        model = TextEncoder(TOWER).model
        save_file(model.state_dict(), folder / "model.safetensors")
        for name, content in (files or {}).items():
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content(place))
        config = resolve_pretrained(TextEncoderConfig(pretrained=str(folder)))
        TextEncoder(config).load_pretrained(str(folder))

    return attack


AUTO_MAP = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}


ATTACKS: dict[str, Callable[[Place], None]] = {
    "weights_pickle": in_model("model.safetensors", pickled),
    "weights_torch_zip": in_model("model.safetensors", torch_zip),
    "weights_object_array": in_model("model.safetensors", object_array),
    "weights_header_2_63": in_model("model.safetensors", safetensors(b"{}", 2**63)),
    "weights_header_deep": in_model("model.safetensors", safetensors(b'{"a":' * 100_000)),
    "weights_out_of_bounds": in_model("model.safetensors", safetensors(
        b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,39999999996]}}')),
    "weights_gzip_bomb": in_model("model.safetensors", gzip_bomb),
    "config_pickle": in_model("config.json", pickled),
    "config_yaml_object": in_model("config.json", yaml_object),
    "config_deep": in_model("config.json", deep_json),
    "tokenizer_pickle": in_model("tokenizer.json", pickled),
    "tokenizer_deep": in_model("tokenizer.json", deep_json),
    "card_pickle": in_model("card.json", pickled),
    "pickles_beside_no_weights": pickle_beside_no_weights,
    "code_beside_the_model": code_beside_the_model,
    "model_named_pipe": model_named(f"pipe:touch {CANARY}"),
    "model_named_command": model_named(f"$(touch {CANARY})"),
    "run_pickle": run_json(pickled),
    "run_yaml_object": run_json(yaml_object),
    "run_deep": run_json(deep_json),
    "tower_auto_map": tower(auto_map=AUTO_MAP),
    "tower_custom_type": tower(auto_map=AUTO_MAP, model_type="evil"),
    "tower_attention_of_a_hub": tower(_attn_implementation_internal="evil/kernels"),
    "tower_attention_name": tower(_attn_implementation="evil/kernels:x", attn_implementation="a/b"),
    "tower_quantization": tower(quantization_config={"quant_method": "evil", "auto_map": AUTO_MAP}),
    "tower_config_pickle": tower({"config.json": pickled}),
    "tower_weights_pickle": tower({"model.safetensors": pickled}),
    "tower_pickle_only": tower({"model.safetensors": None, "pytorch_model.bin": torch_zip}),
    "tower_adapter": tower({
        "adapter_config.json": lambda p: b'{"peft_type": "LORA", "base_model_name_or_path": "/x"}',
        "adapter_model.bin": torch_zip}),
}  # fmt: skip
