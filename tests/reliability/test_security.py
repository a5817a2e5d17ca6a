"""Nothing that comes from outside is run, and nothing is written but where it was asked for."""

from __future__ import annotations

import ast
import dataclasses
import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from slap_fast import atomic_files, checkpoint
from slap_fast.cli import main
from slap_fast.config import TextEncoderConfig, override, slap_tiny
from slap_fast.data.audio.decode import decode
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.index import INDEX, ROWS, checksum
from slap_fast.data.shards.writer import file_sha256, write_shards
from slap_fast.inference.slap import Slap
from slap_fast.models.slap import SlapModel
from slap_fast.models.text_encoder import TextEncoder, modernbert_config, resolve_pretrained
from slap_fast.models.tokenizer import CaptionTokenizer
from tests.helpers.paths import ROOT

# What the source may not say

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "torch.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.hub.load",
}  # fmt: skip
UNSAFE_METHODS = {"extractall", "extract"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def complaints(source: str) -> list[str]:
    """What a module says that could run or write what comes from outside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_CALLS]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            method = name.rpartition(".")[2] if "." in name else ""
            if name in UNSAFE_CALLS or method in UNSAFE_METHODS:
                found.append(name)
            for switch in ("shell", "trust_remote_code", "allow_pickle"):
                if switch in keywords and keywords[switch] is not False:
                    found.append(f"{name}({switch}=...)")
            if name in ("np.load", "numpy.load") and "allow_pickle" not in keywords:
                found.append(f"{name} without allow_pickle=False")
    return found


def modules() -> list[Path]:
    folders = ("slap_fast", "kernels", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_module_says_anything_unsafe(figure):
    files = modules()
    assert len(files) > 40
    for seed in figure("A7", ci=len(files), soak=len(files)):
        found = complaints(files[seed].read_text(encoding="utf-8"))
        assert not found, f"{files[seed]}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "eval('1')",
        "exec(code)",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=flag)",
        "tar.extractall(path)",
        "tar.extract(member)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_is_unsafe_is_seen(source):
    assert complaints(source)


def test_what_is_safe_is_not():
    assert not complaints("model.eval()\nnp.load(p, allow_pickle=False)\nyaml.safe_load(t)")


# What comes from outside

CANARY = "CANARY"


class Evil:
    """Unpickled, it leaves a file."""

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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an attack happens."""

    root: Path
    """May be written to, all below it."""
    canary: Path
    """Outside of it."""

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
        """A good set of two clips."""
        self.clip("a.wav"), self.clip("b.flac")
        rows = '{"path": "a.wav", "caption": "a"}\n{"path": "b.flac", "caption": "b"}\n'
        out = self.root / "set"
        write_shards(read_manifest(self.file("m.jsonl", rows)), out)
        return out


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
    checkpoint.write_files(folder, checkpoint.model_files(SlapModel(config), words, {}))
    return folder


def load_sealed(folder: Path) -> None:
    """Loads a folder whose checksums the attacker has made to fit."""
    atomic_files._seal(folder)
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
    """A text tower whose config says more than it should, or whose files are something else."""

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


def config_file(content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        place.clip()
        manifest = place.file("m.csv", "path,caption\ngood.wav,noise\n")
        path = place.file("evil.yaml", content(place))
        words = ["train", "--data", str(manifest), "--config", str(path), "--workers", "0"]
        main([*words, "--out", str(place.root / "run")])

    return attack


def yaml_text(text: str) -> Callable[[Place], bytes]:
    return lambda place: text.replace(CANARY, str(place.canary)).encode()


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
    """Reads, packs and checks a manifest with this path."""

    def attack(place: Place) -> None:
        place.clip()
        there = path.replace(CANARY, str(place.canary))
        rows = [{"path": there, "caption": "a"}, {"path": "good.wav", "caption": "b"}]
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


def audio(name: str, content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        decode(place.file(name, content(place)), end=30.0)

    return attack


def flac_bomb(place: Place) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(10 * 60 * 16_000, 0.1), 16_000, format="FLAC")
    return file.getvalue()


def in_shards(name: str, content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    """A file of a good set is something else."""

    def attack(place: Place) -> None:
        folder = place.shards()
        target = next(folder.glob("*.tar")) if name == "shard" else folder / name
        target.write_bytes(content(place))
        read_all(folder)

    return attack


def read_all(folder: Path) -> None:
    source = open_source(folder, None, fallback="train")
    for i in range(len(source)):
        try:
            source.audio(i)
        except AudioError:
            pass


def index_says(**fields: object) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        folder = place.shards()
        index = json.loads((folder / INDEX).read_text())
        index["shards"][0] |= fields
        (folder / INDEX).write_text(json.dumps(index).replace(CANARY, str(place.canary)))
        read_all(folder)

    return attack


def tar_of(kind: bytes, name: str, target: str = "") -> Callable[[Place], bytes]:
    def content(place: Place) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(30):
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, target, 0
                member.devmajor, member.devminor = 1, number
                tar.addfile(member)
        return file.getvalue()

    return content


def headers_with_an_index_that_agrees(place: Place) -> None:
    """Members that climb, link and make devices, under checksums that are right."""
    folder = place.shards()
    shard, rows = next(folder.glob("*.tar")), np.load(folder / ROWS)
    data = bytearray(shard.read_bytes())
    for row, kind in zip(rows, (tarfile.SYMTYPE, tarfile.CHRTYPE), strict=True):
        member = tarfile.TarInfo(f"../../{CANARY}")
        member.type, member.linkname, member.size = kind, "/etc/passwd", int(row["audio_bytes"])
        at = int(row["offset"])
        data[at : at + 512] = member.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(data)
    ends = [*rows["offset"][1:].astype(int), len(data) - 1024]
    for row, end in zip(rows, ends, strict=True):
        row["checksum"] = checksum(row, bytes(data[int(row["offset"]) : end]))
    np.save(folder / ROWS, rows)
    index = json.loads((folder / INDEX).read_text())
    index["rows_sha256"] = file_sha256(folder / ROWS)
    (folder / INDEX).write_text(json.dumps(index))
    source = open_source(folder, None, fallback="train")
    assert [len(source.audio(i).waveform) for i in range(2)] == [8_000, 8_000]


def npy_header(place: Place) -> bytes:
    text = f"{{'descr': __import__('os').system('touch {place.canary}'), 'shape': (2,)}}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


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
    "audio_pickle": audio("a.wav", pickled),
    "audio_gzip_bomb": audio("a.wav", gzip_bomb),
    "audio_zip_bomb": audio("a.flac", zip_bomb),
    "audio_flac_bomb": audio("a.flac", flac_bomb),
    "audio_playlist": audio("a.mp4", lambda p: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
    "audio_concat": audio("a.webm", lambda p: b"ffconcat version 1.0\nfile '/etc/passwd'\n"),
    "shard_pickle": in_shards("shard", pickled),
    "shard_gzip_bomb": in_shards("shard", gzip_bomb),
    "shard_climbs": in_shards("shard", tar_of(tarfile.REGTYPE, f"../../{CANARY}")),
    "shard_absolute": in_shards("shard", tar_of(tarfile.REGTYPE, f"/tmp/{CANARY}")),
    "shard_symlink": in_shards("shard", tar_of(tarfile.SYMTYPE, "a.wav", "/etc/passwd")),
    "shard_hardlink": in_shards("shard", tar_of(tarfile.LNKTYPE, "a.wav", "/etc/passwd")),
    "shard_device": in_shards("shard", tar_of(tarfile.CHRTYPE, "a.wav")),
    "shard_fifo": in_shards("shard", tar_of(tarfile.FIFOTYPE, "a.wav")),
    "shard_headers_and_index": headers_with_an_index_that_agrees,
    "index_pickle": in_shards(INDEX, pickled),
    "index_deep": in_shards(INDEX, deep_json),
    "index_climbs": index_says(name="../../x.tar"),
    "index_absolute": index_says(name="/etc/passwd.tar"),
    "index_pipe": index_says(name=f"pipe:touch {CANARY}.tar"),
    "rows_pickle": in_shards(ROWS, pickled),
    "rows_object_array": in_shards(ROWS, object_array),
    "rows_header_code": in_shards(ROWS, npy_header),
}  # fmt: skip

EXECUTES = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
    "pickle.find_class", "socket.connect", "socket.getaddrinfo", "os.fork",
}  # fmt: skip
watching: dict[str, Path | list[str]] = {}


def watch(event: str, args: tuple) -> None:
    """An audit hook: what is run, and what is opened to write outside of the attack's place."""
    if not watching:
        return
    if event in EXECUTES:
        watching["seen"].append(f"{event}{args}")
    elif event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(args[0])
        if not path.startswith(str(watching["root"])) and path != os.devnull:
            watching["seen"].append(f"write {path}")


@pytest.fixture(scope="module", autouse=True)
def audit() -> None:
    sys.addaudithook(watch)  # there is no way to take one off


def outside(tmp_path: Path, root: Path) -> set[Path]:
    return {path for path in tmp_path.rglob("*") if root not in path.parents}


def attacked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an attack has run or written outside of its place."""
    root = tmp_path / name / "a" / "b"
    root.mkdir(parents=True)
    place = Place(root, tmp_path / CANARY)
    monkeypatch.chdir(root)
    before = outside(tmp_path, root)
    watching.update(root=root, seen=[])
    try:
        ATTACKS[name](place)
    except RecursionError:
        raise
    except (ValueError, RuntimeError, OSError):
        pass  # refused: any other type of error is a bug and fails the test
    finally:
        seen = list(watching["seen"])
        watching.clear()
    stray = [module for module in ("modeling_evil", "configuration_evil", "antigravity")
             if module in sys.modules]  # fmt: skip
    return seen + stray + [str(path) for path in outside(tmp_path, root) - before]


def test_malicious_files_run_and_write_nothing(tmp_path, monkeypatch, figure, capsys):
    # Modules that are loaded on first use may start processes and write their bytecode.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = list(ATTACKS)
    for seed in figure("A6", ci=len(names), soak=len(names)):
        assert not attacked(names[seed], tmp_path, monkeypatch), names[seed]


@pytest.mark.parametrize("how", ["system", "unpickle", "write"])
def test_an_attack_that_works_is_seen(how, tmp_path, monkeypatch):
    def write(place: Place) -> None:
        (place.root.parent / "stray").write_text("x")

    works = {
        "system": lambda place: os.system("true"),
        "unpickle": lambda place: pickle.loads(pickled(place)),
        "write": write,
    }
    monkeypatch.setitem(ATTACKS, how, works[how])
    assert attacked(how, tmp_path, monkeypatch)
