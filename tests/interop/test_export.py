"""The exported audio tower gives the model's embeddings, for clips of any length."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slap_fast.cli import main
from slap_fast.config import override, slap_tiny
from slap_fast.data.patches import clip_patches
from slap_fast.inference.slap import Slap
from slap_fast.interop import export
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer

SMALL = {
    "model.audio.hidden_size": 32,
    "model.audio.num_heads": 2,
    "model.audio.num_layers": 3,
    "model.audio.local_window": 2,
    "model.text.num_layers": 1,
    "model.caption.num_layers": 1,
    "model.embed_dim": 8,
}
SECONDS = [0.03, 0.5, 12.3]


def make_model(**more):
    torch.manual_seed(0)
    return SlapModel(override(slap_tiny(), SMALL | more).model).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def noise(seconds):
    return np.random.default_rng(1).standard_normal(round(16_000 * seconds)).astype(np.float32) / 9


def embed(model, waveform):
    with torch.no_grad():
        return model.embed_audio(clip_patches(waveform, model.config.mel))[0].numpy()


@pytest.mark.parametrize("preset", ["kaldi", "torchaudio"])
def test_the_dense_path_is_the_packed_one(preset):
    model = make_model(**{"model.mel.preset": preset})
    clip = export.ClipEmbedder(model)
    for seconds in SECONDS:
        waveform = noise(seconds)
        patches = clip.front_end(torch.from_numpy(waveform))
        expected = clip_patches(waveform, model.config.mel).patches
        torch.testing.assert_close(patches, expected, rtol=0, atol=1e-4)
        embedding = clip(torch.from_numpy(waveform)).numpy()
        np.testing.assert_allclose(embedding, embed(model, waveform), atol=1e-5)


def test_one_traced_program_takes_every_length(model, tmp_path):
    assert export.export(model, tmp_path / "clip.pt2") < export.TOLERANCE
    program = torch.export.load(tmp_path / "clip.pt2").module()
    for seconds in SECONDS:
        embedding = program(torch.from_numpy(noise(seconds))).numpy()
        np.testing.assert_allclose(embedding, embed(model, noise(seconds)), atol=1e-4)


def test_onnxruntime_gives_the_embeddings(model, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = CaptionTokenizer.load(None, model.config.text.max_tokens)
    Slap(model, words).save_pretrained(tmp_path / "model")
    out = tmp_path / "there" / "clip.onnx"
    assert main(["export", "--model", str(tmp_path / "model"), "--out", str(out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["sample_rate"], summary["embed_dim"]) == (16_000, 8)
    assert summary["difference"] < export.TOLERANCE
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (input_,), (output,) = session.get_inputs(), session.get_outputs()
    assert (input_.name, input_.shape, output.name) == ("waveform", ["num_samples"], "embedding")
    assert session.get_modelmeta().custom_metadata_map["sample_rate"] == "16000"
    for seconds in SECONDS:
        (embedding,) = session.run(None, {"waveform": noise(seconds)})
        np.testing.assert_allclose(embedding, embed(model, noise(seconds)), atol=1e-4)


def test_a_file_that_differs_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_as_program", lambda model: (b"", lambda w: np.zeros(8)))
    with pytest.raises(RuntimeError, match="not written: .* away from the model"):
        export.export(model, tmp_path / "clip.pt2")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="out: found 'a.bin', expected a name that ends in .onnx"):
        export.export(model, Path("a.bin"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install 'slap-fast\[export\]'"):
        export.export(model, tmp_path / "clip.onnx")
