"""Adapters for other packages: each gives the same results as Slap."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from slap_fast import Slap
from slap_fast.config import override
from slap_fast.data.patches import clip_patches
from slap_fast.training.loop import train
from slap_fast.training.state import begin
from tests.helpers import runs

SMALL = override(runs.SMALL, {"steps": 2})
SECONDS = (1.0, 0.3, 2.0, 0.5)
TEXTS = ["a dog barks", "rain on a roof of tin", "x", "a bell"]


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(int(s * 16_000)).astype(np.float32) for s in SECONDS]


@pytest.fixture(scope="module")
def slap():
    state, words = begin(SMALL, None, None, torch.device("cpu"))
    return Slap(state.model, words)


@pytest.fixture(scope="module")
def folder(slap, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    slap.save_pretrained(path)
    return str(path)


def wav(clip):
    file = io.BytesIO()
    soundfile.write(file, clip, 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def dataset(clips, **columns):
    datasets = pytest.importorskip("datasets")
    rows = {"audio": [{"bytes": wav(clip), "path": f"{i}.wav"} for i, clip in enumerate(clips)]}
    kind = datasets.Audio(decode=False)
    return datasets.Dataset.from_dict({**rows, **columns}).cast_column("audio", kind)


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-5)


def test_audio_comes_in_many_forms(slap, clips):
    from slap_fast.data.audio.items import audio_item

    class Decoder:
        def get_all_samples(self):
            return type(
                "Samples", (), {"data": torch.tensor(clips[0])[None], "sample_rate": 16_000}
            )

    stereo = np.stack([clips[0] * 2, np.zeros_like(clips[0])])
    forms = [
        {"bytes": wav(clips[0]), "path": "a.wav"},
        {"array": clips[0], "sampling_rate": 16_000},
        {"array": stereo, "sampling_rate": 16_000},
        Decoder(),
        clips[0],
    ]
    assert_close(slap.embed_audio([audio_item(x) for x in forms]), slap.embed_audio([clips[0]] * 5))


def test_a_dataset_is_trained_and_evaluated_on(slap, clips, tmp_path):
    datasets = pytest.importorskip("datasets")
    from slap_fast.data.sources.huggingface import DatasetClips

    rows = dataset(
        clips, caption=[TEXTS[:2], TEXTS[2:3], *([t] for t in TEXTS[2:])], kind=[1, 0, 1, 0]
    )
    rows = rows.cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    source = DatasetClips(rows.cast_column("audio", datasets.Audio()), label="kind")
    assert [source.seconds(i) for i in range(4)] == pytest.approx(SECONDS)
    assert source.captions(0) == tuple(TEXTS[:2]) and source.label(0) == "dog"
    assert_close(source.audio(2, 0.5, 1.5).waveform, clips[2][8_000:24_000])
    assert_close(slap.embed_audio([source.item(i) for i in range(4)]), slap.embed_audio(clips))
    state, words = begin(SMALL, None, None, torch.device("cpu"))
    assert train(state, source, words, tmp_path / "run", progress=False)


def test_a_bad_row_of_a_dataset_is_left_out_and_named(clips):
    pytest.importorskip("datasets")
    from slap_fast import AudioError
    from slap_fast.data.sources.huggingface import DatasetClips

    rows = dataset(clips[:1], caption=["x"]).map(
        lambda row: {"audio": {"bytes": b"not audio at all", "path": "7.wav"}}
    )
    source = DatasetClips(rows)
    assert source.seconds(0) == 0.0
    with pytest.raises(AudioError, match="7.wav"):
        source.audio(0)
    with pytest.raises(ValueError, match="dataset: found columns .*, expected 'text'"):
        DatasetClips(rows, caption="text")


def test_hear(folder, slap, clips):
    from slap_fast.interop import hear

    model = hear.load_model(folder)
    audio = torch.tensor(np.stack([clips[2], clips[2][::-1].copy()]))
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (2, model.scene_embedding_size)
    assert_close(scenes, slap.embed_audio(list(audio.numpy())))
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    mel, columns = slap.model.config.mel, times.shape[1]
    assert embeddings.shape == (2, columns, model.timestamp_embedding_size)
    with torch.no_grad():
        dense = slap.model.audio_encoder(clip_patches(clips[2], mel))
    assert_close(embeddings[0, 1, :32], dense[mel.patches_per_column])
    step = 1000 * mel.patch_time * mel.hop_length / mel.sample_rate
    assert_close(times.diff(dim=1), np.full((2, columns - 1), step))
    assert step / 2 <= times[0, 0] <= step / 2 + 25


def test_a_timestamp_is_where_the_sound_is(folder):
    from slap_fast.interop import hear

    model = hear.load_model(folder)
    quiet = torch.zeros(1, 64_000)
    click = quiet.clone()
    click[0, 40_000] = 0.9
    patches = [model.patches(x).patches.reshape(-1, 4 * 256) for x in (quiet, click)]
    changed = (patches[0] - patches[1]).abs().sum(1).nonzero().flatten()
    times = hear.get_timestamp_embeddings(quiet, model)[1][0, changed]
    mel = model.slap.config.mel
    half_a_column = 500 * mel.patch_time * mel.hop_length / mel.sample_rate
    assert len(times) and (times - 2_500).abs().max() <= half_a_column + 25


def test_xares(folder, slap, clips):
    from slap_fast.interop import hear, xares

    class SlapEncoder(xares.SlapEncoder):
        pass

    SlapEncoder.folder = folder
    encoder = SlapEncoder()
    audio = torch.tensor(clips[2])[None]
    assert_close(encoder(audio), hear.get_timestamp_embeddings(audio, encoder.model)[0])
    checker = pytest.importorskip("xares.audio_encoder_checker")
    assert checker.check_audio_encoder(encoder)


@pytest.fixture
def task_of(clips):
    mteb = pytest.importorskip("mteb")
    from mteb.abstasks.task_metadata import TaskMetadata

    def make(base, kind, category, data, **options):
        facts = {
            "name": "Four",
            "description": "four clips",
            "type": kind,
            "category": category,
            "modalities": ["audio", "text"] if "t" in category else ["audio"],
            "eval_splits": ["test"],
            "eval_langs": ["eng-Latn"],
            "main_score": options.pop("main_score"),
            "dataset": {"path": "none", "revision": "none"},
        }
        empty = ("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")
        unset = dict.fromkeys((*empty, "reference", "sample_creation", "bibtex_citation"))
        body = {"metadata": TaskMetadata(**facts, **unset), "data_loaded": True, **options}
        task = type("Four", (base,), body)()
        task.dataset = data
        return task

    return mteb, make


def test_mteb_zero_shot(slap, clips, task_of):
    mteb, make = task_of
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    from slap_fast.interop.mteb import SlapEncoder

    expected = slap.similarity(slap.embed_audio(clips), slap.embed_text(TEXTS)).argmax(1)
    task = make(
        AbsTaskZeroShotClassification,
        "AudioZeroshotClassification",
        "a2t",
        {"test": dataset(clips, label=expected.tolist())},
        main_score="accuracy",
        input_column_name="audio",
        label_column_name="label",
        get_candidate_labels=lambda self: TEXTS,
    )
    result = mteb.evaluate(SlapEncoder(slap), task, cache=None)
    assert result.task_results[0].scores["test"][0]["accuracy"] == 1.0


def test_mteb_reads_audio_undecoded_and_adds_what_a_row_has(slap, clips):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("mteb")
    from slap_fast.interop.mteb import SlapEncoder

    encoder = SlapEncoder(slap)
    facts = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}

    def encode(rows):
        return encoder.encode(torch.utils.data.DataLoader(rows, batch_size=3), **facts)

    decoding = dataset(clips).cast_column("audio", datasets.Audio())
    audio, text = slap.embed_audio(clips), slap.embed_text(TEXTS)
    assert_close(encode(decoding), audio)
    assert_close(encode(datasets.Dataset.from_dict({"text": TEXTS})), text)
    assert_close(encode(decoding.add_column("text", TEXTS)), audio + text)
    with pytest.raises(ValueError, match="inputs: found columns label, expected text or audio"):
        encode(datasets.Dataset.from_dict({"label": [1]}))
    assert encoder.mteb_model_meta.embed_dim == slap.embed_dim


def test_sentence_transformers(folder, slap, clips, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    from slap_fast.interop.sentence_transformers import SlapModule

    model = package.SentenceTransformer(modules=[SlapModule.load(folder)], device="cpu")
    items = [{"array": clip, "sampling_rate": 16_000} for clip in clips]
    assert_close(model.encode(TEXTS), slap.embed_text(TEXTS))
    assert_close(model.encode(items, batch_size=2), slap.embed_audio(clips))
    assert_close(model.encode(["barks"], prompt="a dog "), slap.embed_text(["a dog barks"]))
    assert model.get_embedding_dimension() == slap.embed_dim
    model.save_pretrained(str(tmp_path / "st"))
    again = package.SentenceTransformer(str(tmp_path / "st"), device="cpu", trust_remote_code=True)
    assert_close(again.encode(TEXTS), slap.embed_text(TEXTS))


def test_sentence_transformers_trains(slap, clips):
    package = pytest.importorskip("sentence_transformers")
    from slap_fast.interop.sentence_transformers import SlapModule

    model = package.SentenceTransformer(modules=[SlapModule(slap)], device="cpu")
    items = [{"array": clip, "sampling_rate": 16_000} for clip in clips]
    vectors = [model(model.preprocess(x))["sentence_embedding"] for x in (items, TEXTS)]
    (vectors[0] @ vectors[1].T).logsumexp(1).sum().backward()
    assert slap.model.audio_encoder.patch_embedding.weight.grad.abs().sum() > 0
    slap.model.zero_grad()
    with pytest.raises(ValueError, match="expected text or audio"):
        model[0].preprocess([TEXTS[0], items[0]])


def test_nothing_is_imported_before_it_is_used():
    code = (
        "import json, sys, slap_fast, slap_fast.inference.slap, slap_fast.interop.hear, "
        "slap_fast.interop.xares; print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"datasets", "mteb", "sentence_transformers", "xares", "onnx"} & set(
        json.loads(run.stdout)
    )
