"""The isolated decoder: the same results, and a crash, a hang or too much memory loses one item."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from slap_fast.config import override, slap_tiny
from slap_fast.data.audio import isolated
from slap_fast.data.audio.decode import decode, inspect, probe
from slap_fast.data.audio.isolated import IsolatedDecoder
from slap_fast.data.audio.track import AudioError
from slap_fast.data.loader import TrainSteps, steps_from
from slap_fast.data.open import open_source
from slap_fast.data.sources.files import ManifestClips
from slap_fast.models.tokenizer import CaptionTokenizer

EVIL = """
import os, signal, sys, time
from slap_fast.config import override, slap_tiny
from slap_fast.data.audio import isolated

def evil(path_or_bytes, **options):
    is_path = isinstance(path_or_bytes, str)
    source = open(path_or_bytes, "rb").read() if is_path else path_or_bytes
    if source == b"segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if source == b"exit":
        os._exit(3)
    if source == b"spin":
        while True:
            pass
    if source == b"sleep":
        time.sleep(1000)
    if source == b"memory":
        bytearray(2 << 30)
    if source == b"write":
        os.write(os.open("stray", os.O_CREAT | os.O_WRONLY), b"x")
    print("a warning of a library", flush=True)
    return isolated.decode(source, **options)

isolated.FUNCTIONS["decode"] = evil
isolated.serve()
"""


def wav(seconds: float = 0.2) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, (round(44_100 * seconds), 2))
    soundfile.write(file, noise, 44_100, format="WAV")
    return file.getvalue()


@pytest.fixture
def decoder():
    made = IsolatedDecoder()
    yield made
    made.close()


@pytest.fixture
def evil(monkeypatch):
    monkeypatch.setattr(isolated, "COMMAND", ("-c", EVIL))
    monkeypatch.setattr(isolated, "WALL_FACTOR", 100.0)
    made = IsolatedDecoder(cpu_seconds=0.1)
    yield made
    made.close()


def test_results_equal_those_of_the_functions(decoder, tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(wav())
    for source in (path, str(path), wav()):
        expected, actual = decode(source, end=0.1), decoder.decode(source, end=0.1)
        np.testing.assert_array_equal(actual.waveform, expected.waveform)
        assert actual.waveform.dtype == np.float32 and actual.waveform.flags.writeable
        assert (actual.seconds, actual.warnings) == (expected.seconds, expected.warnings)
        assert decoder.probe(source) == probe(source)
        assert decoder.inspect(source) == inspect(source)


def test_errors_equal_those_of_the_functions(decoder, tmp_path):
    for source in (b"<html>", wav()[:-9_000], tmp_path / "none.wav"):
        with pytest.raises(AudioError) as expected:
            decode(source)
        with pytest.raises(AudioError) as actual:
            decoder.decode(source)
        assert actual.value.args == expected.value.args
    pid = decoder._process.pid
    assert len(decoder.decode(wav()).waveform) == 3_200 and decoder._process.pid == pid


@pytest.mark.parametrize(
    ("item", "crash"),
    [
        ("segfault", "SIGSEGV"),
        ("exit", "exit code 3"),
        ("spin", "SIGXCPU"),
        ("memory", "exit code 1"),
        ("write", "exit code 1"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_crash_loses_one_item(evil, item, crash, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(evil.decode(wav()).waveform) == 3_200
    with pytest.raises(AudioError, match=f"E_CRASH.*{crash}"):
        evil.decode(item.encode())
    assert len(evil.decode(wav()).waveform) == 3_200
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="no wait with a limit")
def test_a_hang_is_ended_on_the_wall_clock(evil, monkeypatch):
    monkeypatch.setattr(isolated, "WALL_FACTOR", 5.0)
    start = time.monotonic()
    with pytest.raises(AudioError, match="E_CRASH.*SIGKILL"):
        evil.decode(b"sleep")
    assert time.monotonic() - start < 3
    assert len(evil.decode(wav()).waveform) == 3_200


def test_an_item_that_crashed_twice_is_not_tried_again(evil):
    for _ in range(2):
        with pytest.raises(AudioError, match="exit code 3"):
            evil.decode(b"exit")
    evil.decode(wav())
    pid = evil._process.pid
    for _ in range(3):
        with pytest.raises(AudioError, match="E_CRASH: found a file that crashed twice"):
            evil.decode(b"exit")
    assert evil._process.pid == pid and len(evil.decode(wav()).waveform) == 3_200


def test_training_continues_without_the_item(evil, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.wav").write_bytes(wav())
    (tmp_path / "bad.wav").write_bytes(b"segfault")
    rows = "".join(f"{name}.wav,noise,0.2\n" for name in ("a", "bad", "b", "c"))
    (tmp_path / "m.csv").write_text("path,caption,duration_s\n" + rows)
    source = open_source(tmp_path / "m.csv", None, fallback="train", decoder=evil)
    config = override(slap_tiny(), {"batch_size": 4, "steps": 3})
    data = TrainSteps(source, CaptionTokenizer.load(None, 96), config)
    for step in steps_from(data, 0, workers=1):
        assert step.seen == 4 and sum(len(batch.groups) for batch in step.batches) == 3
        assert [(bad.key, bad.code, bad.bytes) for bad in step.bad] == [("bad.wav", "E_CRASH", 8)]


def test_a_copy_and_a_fork_have_a_process_of_their_own(decoder):
    decoder.decode(wav())
    assert pickle.loads(pickle.dumps(decoder))._process is None
    if not hasattr(os, "fork"):
        return
    pid = os.fork()
    if not pid:
        parent = decoder._process.pid
        decoder.decode(wav())
        child = decoder._process.pid
        decoder.close()
        os._exit(0 if child != parent else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(decoder.decode(wav()).waveform) == 3_200


def test_a_decoder_that_does_not_start_raises(monkeypatch):
    monkeypatch.setattr(isolated, "COMMAND", ("-c", "raise SystemExit(1)"))
    with pytest.raises(RuntimeError, match="does not start"):
        IsolatedDecoder().decode(wav())


@pytest.mark.skipif(os.name == "nt", reason="terminate ends a process there")
def test_a_signal_to_all_processes_loses_no_item(decoder):
    decoder.decode(wav())
    process = decoder._process
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    assert len(decoder.decode(wav()).waveform) == 3_200 and decoder._process is process


def test_the_process_ends_with_its_parent():
    program = "from slap_fast.data.audio.isolated import IsolatedDecoder as D\nd = D()"
    program += "\ntry: d.decode(b'')\nexcept ValueError: pass\n"
    program += "print(d._process.pid, flush=True)\nimport os\nos._exit(0)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    for _ in range(100):
        try:
            os.kill(int(run.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the decoder outlives its parent")


def test_the_process_does_not_import_torch():
    program = "import slap_fast.data.audio.isolated, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_source_decodes_through_it(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    (tmp_path / "a.txt").write_text("noise")
    decoder = IsolatedDecoder()
    source = open_source(tmp_path, None, fallback="train", decoder=decoder)
    assert isinstance(source, ManifestClips) and source.seconds(0) == 0.2
    assert len(source.audio(0).waveform) == 3_200 and decoder._process is not None
    decoder.close()
