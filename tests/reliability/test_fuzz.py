"""Damaged audio, and text of every kind: an answer or a typed error, never anything else."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from slap_fast import cli
from slap_fast.cli.options import load_recipe, parse_setting
from slap_fast.config import TrainConfig, override, slap_tiny
from slap_fast.data.manifest import ManifestError, read_manifest, row_of
from slap_fast.data.shards.index import INDEX, ShardError, read_index
from slap_fast.data.sources.mixture import read_mix
from tests.helpers.fuzz_audio import ENCODINGS, damaged, intact, outcome
from tests.helpers.paths import ROOT

# Audio


def test_good_files_decode_and_each_code_occurs():
    assert {outcome(intact(kind, other)) for kind in range(len(ENCODINGS)) for other in (0, 1)} == {
        "ok"
    }
    outcomes = Counter(outcome(damaged(seed)) for seed in range(1_500))
    assert outcomes["ok"] > 200 and len(outcomes) >= 8, outcomes


class Fuzzer:
    """The process of ``fuzz_audio``."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fuzz_audio"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders print warnings about files
            text=True,
        )

    def run(self, first: int, count: int) -> dict:
        self.process.stdin.write(f"{first} {count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"seeds {first} .. {first + count - 1}: exit code {self.process.wait()}"
        return json.loads(line)


@pytest.mark.slow
def test_damaged_audio_neither_crashes_nor_hangs_nor_fills_memory(figure):
    fuzzer = Fuzzer()
    for first in figure("A1", ci=20_000, soak=1_000_000, batch=500):
        result = fuzzer.run(first, 500)
        assert sum(result["outcomes"].values()) == 500 and result["peak_mb"] < 512
    fuzzer.process.kill()
    fuzzer.process.wait()


# Text

ANY = st.text(max_size=20)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -1, 1e308]))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, ANY)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=8,
)
COLUMNS = st.sampled_from(["path", "caption", "label", "split", "start", "end", "duration_s", "x"])
ROWS = st.dictionaries(COLUMNS, JSON, max_size=6)
LIKELY = st.fixed_dictionaries(
    {"path": ANY | JSON, "caption": ANY | st.lists(ANY | JSON, max_size=3)},
    optional={"label": JSON, "split": ANY, "start": NUMBERS, "end": NUMBERS},
)
TEXT = st.binary(max_size=120) | st.text(max_size=120).map(lambda t: t.encode("utf-8", "ignore"))


def no_surrogates(value):
    return json.dumps(value).encode()


JSONL = st.lists(st.one_of((ROWS | LIKELY | JSON).map(no_surrogates), TEXT), max_size=5).map(
    b"\n".join
)
CSV = st.lists(
    st.one_of(st.lists(ANY, min_size=1, max_size=4).map(lambda v: ",".join(v)), ANY), max_size=5
).map(lambda lines: "\n".join(["path,caption,start", *lines]).encode("utf-8", "surrogatepass"))
CONFIG_KEYS = st.sampled_from([
    "steps", "lr", "betas", "model", "loss", "data", "model.audio.hidden_size", "data.cache_gb",
    "model.text.pretrained", "loss.contrastive_kind", "precision", "seed", "model.mel", "x.y", "",
])  # fmt: skip
YAML = st.one_of(
    TEXT,
    st.dictionaries(CONFIG_KEYS | ANY, JSON, max_size=4).map(
        lambda value: yaml.safe_dump(value).encode("utf-8", "surrogatepass")
    ),
)


def assert_rows(rows) -> None:
    for row in rows:
        assert row.captions or row.label
        assert row.start >= 0 and (row.end is None or row.end > row.start)
        for text in (*row.captions, str(row.path), row.label or "", row.split or ""):
            text.encode()
        for caption in row.captions:
            assert caption == caption.strip() == unicodedata.normalize("NFC", caption) != ""


def manifest_case(folder: Path, suffix: str, content: bytes) -> None:
    """Strict reading gives rows or a ManifestError; lenient reading continues after bad lines."""
    path = folder / f"m{suffix}"
    path.write_bytes(content)
    bad: list[ManifestError] = []
    try:
        lenient = read_manifest(path, bad=bad)
    except ManifestError as error:
        # Of the file as a whole: no rows, or a header or delimiter that fits none of them.
        assert str(error).startswith(str(path)) and str(error).isprintable()
        return
    assert_rows(lenient)
    try:
        strict = read_manifest(path)
    except ManifestError as error:
        assert str(bad[0]) == str(error) and "\n" not in str(error)
    else:
        assert not bad and strict == lenient


def fields_case(folder: Path, fields: dict) -> None:
    try:
        assert_rows([row_of(folder / "x", 1, "", {**fields, "path": "k"})])
    except ManifestError as error:
        assert error.code.startswith(("E_CAPTION_", "E_MANIFEST"))


def config_case(folder: Path, content: bytes) -> None:
    path = folder / "c.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_recipe(str(path)), TrainConfig)
    except ValueError as error:
        assert str(error)


def setting_case(key: str, value: str) -> None:
    try:
        override(slap_tiny(), dict([parse_setting(f"{key}={value}")]))
    except ValueError as error:
        assert str(error)


def mix_case(folder: Path, content: bytes) -> None:
    path = folder / "mix.yaml"
    path.write_bytes(content)
    try:
        assert all(part.weight > 0 for part in read_mix(path))
    except ValueError as error:
        assert str(path) in str(error)


def index_case(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    try:
        read_index(folder)
    except ShardError as error:
        assert INDEX in str(error)


INDEX_JSON = st.fixed_dictionaries(
    {"format_version": st.just(1) | JSON, "rows": st.integers(-2, 5) | JSON},
    optional={
        "rows_sha256": JSON,
        "shards": JSON | st.lists(st.fixed_dictionaries(
            {"name": ANY | st.just("a.tar"), "bytes": NUMBERS, "clips": JSON, "sha256": ANY}),
            max_size=2),
        "splits": JSON | st.dictionaries(ANY, st.fixed_dictionaries(
            {"first": NUMBERS, "last": NUMBERS, "total_seconds": JSON, "longest_seconds": JSON}),
            max_size=2),
    },
).map(no_surrogates)  # fmt: skip
CASES = st.one_of(
    st.tuples(st.just(manifest_case), st.just(".jsonl"), JSONL),
    st.tuples(st.just(manifest_case), st.just(".csv"), CSV | TEXT),
    st.tuples(st.just(fields_case), ROWS | LIKELY),
    st.tuples(st.just(config_case), YAML),
    st.tuples(st.just(setting_case), CONFIG_KEYS | ANY, ANY | JSON.map(str)),
    st.tuples(st.just(mix_case), YAML),
    st.tuples(st.just(index_case), INDEX_JSON | TEXT),
)


def fuzz_text(folder: Path, seed: int, count: int) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(CASES)
    def run(case: tuple) -> None:
        function, *arguments = case
        function(*([] if function is setting_case else [folder]), *arguments)

    run()


@pytest.mark.parametrize("content", [b"?", b"1: 2", b"null: 1", b"model: {true: 1}"])
def test_settings_without_a_name(content, tmp_path):
    """The first is from a soak of A5."""
    config_case(tmp_path, content)


def test_text_of_every_kind_gives_an_answer_or_a_typed_error(tmp_path):
    fuzz_text(tmp_path, 1, 300)


@pytest.mark.slow
def test_much_text_of_every_kind(tmp_path, figure):
    for seed in figure("A5", ci=5_000, soak=500_000, batch=250):
        fuzz_text(tmp_path, seed, 250)


@pytest.mark.parametrize("seed", range(4))
def test_random_arguments_end_with_an_exit_code(seed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = st.sampled_from(
        ["data", "check", "pack", "eval", "train", "--data", "--out", "--config", "--json", "tiny",
         "x.csv", "--split", "--set", "--model", "--help", "--seed", "-1", "a=b", ""]
    )  # fmt: skip

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=10, database=None, deadline=None)
    @hypothesis.given(st.lists(words | ANY, max_size=5))
    def run(arguments: list[str]) -> None:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        assert code in (0, 1, 2)

    run()
