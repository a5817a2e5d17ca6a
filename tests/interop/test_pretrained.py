"""Other people's models through slap_fast.load: the vectors of their own pipelines, one face."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import slap_fast
from slap_fast.checkpoint.format import CheckpointError
from slap_fast.inference.audio_text import AudioTextModel, Captioner
from tests.helpers.public_models import (
    save_clap,
    save_pe_audio,
    save_pe_audio_video,
    tokenizer,
)

RATE = 48_000
TEXTS = ["a dog barks", "rain", "the sound of a bell on a roof " * 9]
KINDS = {
    "clap": save_clap,
    "fused_clap": lambda folder: save_clap(folder, fused=True),
    "pe_audio": save_pe_audio,
    "pe_audio_video": save_pe_audio_video,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    return {kind: save(root / kind) for kind, save in KINDS.items()}


def load(folder):
    model = slap_fast.load(folder)
    if folder.name.startswith("pe_audio"):
        assert model.window_seconds == 30.0
        model.window_seconds = 2.0  # its codec takes 0.2 s a second here
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request, folders):
    return load(folders[request.param])


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (0.1 * samples).astype(np.float32)


def unit(vectors) -> np.ndarray:
    return np.asarray(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)


def pipeline(folder, waveform, texts):
    """Outputs of transformers' own model and processor."""
    from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel, PeAudioModel

    kind = PeAudioModel if folder.name.startswith("pe_audio") else ClapModel
    options = {}
    if folder.name == "pe_audio_video":
        from transformers import AutoConfig

        options["config"] = AutoConfig.from_pretrained(folder).audio_config
    model = kind.from_pretrained(folder, **options).eval()
    audio = AutoFeatureExtractor.from_pretrained(folder)(
        waveform, sampling_rate=RATE, return_tensors="pt"
    )
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return model(
            **audio, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_its_own_pipeline(folders, kind):
    folder, wave = folders[kind], noise(3.3)
    own = pipeline(folder, wave, TEXTS)
    model = slap_fast.load(folder)
    text = own.text_audio_embeds if kind.startswith("pe") else own.text_embeds
    np.testing.assert_allclose(model.embed_audio(wave), unit(own.audio_embeds), atol=1e-5)
    np.testing.assert_allclose(model.embed_text(TEXTS), unit(text), atol=1e-5)
    if kind.startswith("pe"):
        expected = own.logits_audio_text.sigmoid()[0]
    else:
        expected = own.logits_per_audio.softmax(-1)[0]
    answer = model.classify(wave, TEXTS, "{}")
    np.testing.assert_allclose([answer[text] for text in TEXTS], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_file_is_the_mean_of_its_windows(folders, kind):
    model, seconds = load(folders[kind]), 2 if kind.startswith("pe_audio") else 10
    assert model.window_seconds == seconds
    wave = noise(2.3 * seconds)
    starts = [0, seconds / 2, seconds, 1.3 * seconds]
    parts = [wave[round(s * RATE) :][: seconds * RATE] for s in starts]
    own = [pipeline(folders[kind], part, TEXTS) for part in parts]
    mean = torch.cat([output.audio_embeds for output in own]).mean(0, keepdim=True)
    np.testing.assert_allclose(model.embed_audio(wave), unit(mean), atol=1e-5)
    if kind.startswith("pe"):  # its logits are of vectors as they come, of any norm
        probabilities = (10.0 * mean @ own[0].text_audio_embeds.T - 1.0).sigmoid()[0]
        answer = model.classify(wave, TEXTS, "{}")
        np.testing.assert_allclose([answer[text] for text in TEXTS], probabilities, atol=1e-5)
    np.testing.assert_array_equal(model.embed_audio(wave), model.embed_audio(wave))
    with pytest.raises(ValueError, match=f"long: found 'whole'.* hears {seconds} s at a time"):
        model.embed_audio(wave, long="whole")


def test_a_file_has_one_vector_alone_and_in_any_batch(model):
    waves = [noise(s, i) for i, s in enumerate((1.0, 0.4, 12.1, 2.0, 1.0))]
    together = model.embed_audio(waves)
    alone = np.concatenate([model.embed_audio(wave) for wave in waves])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(
        model.embed_text(TEXTS), np.concatenate([model.embed_text(t) for t in TEXTS]), atol=1e-5
    )


def test_bad_files_of_a_batch_are_named_and_the_rest_is_heard(model, tmp_path):
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, noise(12.0)[::3], 16_000, subtype="FLOAT")
    bad.write_bytes(b"<html>not audio</html>")
    vectors, failures, seconds = model.embed_files([bad, good, tmp_path / "none.wav"])
    assert [(f.index, f.code) for f in failures] == [(0, "E_FORMAT"), (2, "E_MISSING")]
    assert np.isnan(vectors[[0, 2]]).all() and seconds.tolist() == [0.0, 12.0, 0.0]
    np.testing.assert_allclose(vectors[1], model.embed_audio(good)[0], atol=1e-5)


def test_it_has_the_face_of_every_model(model, folders):
    assert isinstance(model, AudioTextModel) and not isinstance(model, Captioner)
    vectors = model.embed_audio([noise(1.0), noise(2.0)])
    assert vectors.shape == (2, model.embed_dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert model.similarity(vectors, model.embed_text(TEXTS)).shape == (2, len(TEXTS))
    facts = model.facts()
    assert facts["parameters"] == sum(p.numel() for p in model.model.parameters())
    assert facts["sample_rate"] == model.sample_rate == RATE
    json.dumps(facts)


def test_equal_content_has_an_equal_hash(folders, tmp_path):
    hashes = {kind: slap_fast.load(folder).content_hash for kind, folder in folders.items()}
    assert len(set(hashes.values())) == len(hashes)
    copied = shutil.copytree(folders["clap"], tmp_path / "copied")
    assert slap_fast.load(copied).content_hash == hashes["clap"]
    path = copied / "processor_config.json"
    path.write_text(path.read_text().replace('"rand_trunc"', '"fusion"'))
    assert slap_fast.load(copied).content_hash != hashes["clap"]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"found no \*\.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: not found; known kinds"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "found list, expected an object"),
        (lambda f: edit_config(f, model_type="whisper"), "found model_type 'whisper', expected"),
        (lambda f: (f / "tokenizer.json").unlink(), "its processor cannot be read"),
        (lambda f: (f / "processor_config.json").unlink(), "its processor cannot be read"),
        (lambda f: edit_config(f, projection_dim=25), "shape|size"),
        (lambda f: drop_tensor(f / "model.safetensors"), "has no logit_scale_a"),
    ],
    ids=["weights", "config", "half", "list", "kind", "tokenizer", "processor", "size", "tensor"],
)
def test_a_folder_that_is_not_whole_is_named(folders, tmp_path, damage, message):
    copied = shutil.copytree(folders["clap"], tmp_path / "copied")
    damage(copied)
    with pytest.raises(CheckpointError, match=message) as raised:
        slap_fast.load(copied)
    assert str(copied) in str(raised.value)


def drop_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["logit_scale_a"]
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_pickle_is_never_read(folders, tmp_path):
    copied = shutil.copytree(folders["clap"], tmp_path / "copied")
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle .* is never read"):
        slap_fast.load(copied)


def test_code_of_a_folder_is_never_run(folders, tmp_path):
    copied = shutil.copytree(folders["clap"], tmp_path / "copied")
    edit_config(copied, auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    slap_fast.load(copied).embed_text("a dog")
    assert not (tmp_path / "ran").exists()


def test_a_name_that_is_nowhere_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="nobody/nothing: found no such folder"):
        slap_fast.load("nobody/nothing", local_files_only=True)
    with pytest.raises(CheckpointError, match="at revision 'v2' that was downloaded before"):
        slap_fast.load("nobody/nothing", revision="v2", local_files_only=True)


def test_a_hub_id_and_its_revision(folders, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    repository = tmp_path / "models--laion--small"
    for revision, kind in (("main", "clap"), ("v2", "fused_clap")):
        commit = {"main": "a", "v2": "b"}[revision] * 40
        shutil.copytree(folders[kind], repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = slap_fast.load("laion/small", local_files_only=True)
    fused = slap_fast.load("laion/small", revision="v2", local_files_only=True)
    assert model.name == "laion/small"
    assert model.content_hash == slap_fast.load(folders["clap"]).content_hash
    assert fused.content_hash == slap_fast.load(folders["fused_clap"]).content_hash


def test_frame_level_checkpoints_are_refused(folders, tmp_path):
    copied = shutil.copytree(folders["pe_audio"], tmp_path / "copied")
    edit_config(copied, architectures=["PeAudioFrameLevelModel"])
    with pytest.raises(CheckpointError, match="vectors of frames, expected vectors of clips"):
        slap_fast.load(copied)


def test_a_sentence_transformer_gives_its_own_vectors(folders, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    own = package.SentenceTransformer(str(folders["clap"]), device="cpu")
    own.save_pretrained(str(tmp_path / "st"))
    model, wave = slap_fast.load(tmp_path / "st"), noise(3.3)
    assert isinstance(model, AudioTextModel) and model.facts()["kind"] == "sentence-transformers"
    assert (model.sample_rate, model.window_seconds) == (RATE, 10.0)
    expected = unit(own.encode({"array": wave, "sampling_rate": RATE}))
    np.testing.assert_allclose(model.embed_audio([wave, noise(0.4)])[0], expected, atol=1e-5)
    np.testing.assert_allclose(model.embed_text(TEXTS), unit(own.encode(TEXTS)), atol=1e-5)
    assert sum(model.classify(wave, TEXTS).values()) == pytest.approx(1.0, abs=1e-5)


def test_prompts_of_a_sentence_transformer_are_used(folders, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    own = package.SentenceTransformer(
        str(folders["clap"]), device="cpu", prompts={"query": "the sound of ", "document": ""}
    )
    own.save_pretrained(str(tmp_path / "st"))
    expected = unit(own.encode(["the sound of rain"]))
    model = slap_fast.load(tmp_path / "st")
    np.testing.assert_allclose(model.embed_text("rain"), expected, atol=1e-5)


def test_a_sentence_transformer_of_texts_is_refused(tmp_path):
    package = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(16)]
    package.SentenceTransformer(modules=parts).save_pretrained(str(tmp_path / "st"))
    with pytest.raises(CheckpointError, match="takes text, expected audio and text"):
        slap_fast.load(tmp_path / "st")
