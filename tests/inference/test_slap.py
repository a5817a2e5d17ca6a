"""Slap: order, batch invariance, long clips, inputs of every kind, errors by name."""

import copy

import numpy as np
import pytest
import soundfile
import torch

from slap_fast.config import override, slap_tiny
from slap_fast.data.audio.track import AudioError
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.inference.slap import Slap
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer

RATE = 16_000


@pytest.fixture(scope="module")
def slap():
    torch.manual_seed(0)
    small = {f"model.{tower}.num_layers": 2 for tower in ("audio", "text", "caption")}
    config = override(slap_tiny(), small).model
    return Slap(SlapModel(config), CaptionTokenizer.load(None, 96), {"note": "untrained"})


@pytest.fixture(scope="module")
def waves():
    sounds = SoundSet("test", 6, max_seconds=4.0)
    return [sounds.waveform(i) for i in range(6)]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (0.1 * samples).astype(np.float32)


def test_a_clip_has_one_vector_alone_and_in_any_batch(slap, waves):
    together = slap.embed_audio(waves)
    assert together.shape == (6, 128) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)
    backwards = slap.embed_audio(waves[::-1])[::-1]
    alone = np.concatenate([slap.embed_audio(wave) for wave in waves])
    small = Slap(slap.model, slap.tokenizer, max_tokens=64).embed_audio(waves)
    for other in (backwards, alone, small):
        np.testing.assert_allclose(other, together, atol=1e-5)


def test_text_vectors_do_not_depend_on_the_batch(slap):
    texts = ["a dog", "a long bell that rings and rings, then rain", ""]
    together = slap.embed_text(texts)
    np.testing.assert_allclose(slap.embed_text(texts, batch_size=1), together, atol=1e-5)
    np.testing.assert_allclose(slap.embed_text("a dog")[0], together[0], atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("bfloat16", 0.999), ("float16", 0.9999), ("float64", 0.999999)]
)
def test_a_model_of_another_dtype_gives_the_same_answers(slap, waves, dtype, cosine):
    converted = Slap(copy.deepcopy(slap.model).to(getattr(torch, dtype)), slap.tokenizer)
    texts = ["a dog", "rain"]
    for vectors, expected in (
        (converted.embed_audio(waves), slap.embed_audio(waves)),
        (converted.embed_text(texts), slap.embed_text(texts)),
    ):
        assert (vectors * expected).sum(1).min() > cosine
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert isinstance(converted.caption(waves[0], max_tokens=4), str)


def test_a_clip_may_have_many_forms(slap, waves, tmp_path):
    wave = waves[0].copy()
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    padded = tmp_path / "padded.wav"
    quiet = np.zeros(RATE, dtype=np.float32)
    soundfile.write(padded, np.concatenate([quiet, wave, quiet]), RATE, subtype="FLOAT")
    span = (padded, 1.0, 1.0 + len(wave) / RATE)
    forms = [wave, (wave, RATE), path, str(path), path.read_bytes(), span, wave.astype(np.float64)]
    vectors = slap.embed_audio(forms)
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-5)
    as_int16 = slap.embed_audio((wave * 32_767).round().astype(np.int16))[0]
    assert as_int16 @ vectors[0] > 0.999


def test_another_rate_and_stereo_give_nearly_the_same_vector(slap, waves, tmp_path):
    import soxr

    wave = waves[1]
    at_44k = soxr.resample(wave, RATE, 44_100)
    path = tmp_path / "stereo.flac"
    soundfile.write(path, np.stack([at_44k, at_44k], axis=1), 44_100, subtype="PCM_24")
    vectors = slap.embed_audio([wave, (at_44k, 44_100), path])
    assert (vectors[1:] @ vectors[0]).min() > 0.99


def test_a_long_clip_is_the_mean_of_its_chunks(slap):
    wave = noise(70.0)
    windows = [(0, 30), (15, 45), (30, 60), (40, 70)]
    parts = slap.embed_audio([wave[a * RATE : b * RATE] for a, b in windows])
    mean = parts.mean(0)
    np.testing.assert_allclose(slap.embed_audio(wave)[0], mean / np.linalg.norm(mean), atol=1e-5)
    one_sequence = slap.embed_audio(wave, long="whole")[0]
    assert np.linalg.norm(one_sequence - mean / np.linalg.norm(mean)) > 1e-4


def test_a_bad_item_is_named_or_skipped(slap, waves, tmp_path):
    bad = tmp_path / "bad.mp3"
    bad.write_bytes(b"<html>no</html>")
    items = [waves[0], bad, tmp_path / "missing.wav", np.full(RATE, np.nan), waves[1], noise(0.01)]
    with pytest.raises(AudioError, match="bad.mp3: E_FORMAT"):
        slap.embed_audio(items)
    vectors, failures = slap.embed_audio(items, on_error="skip")
    assert [(f.index, f.code) for f in failures] == [
        (1, "E_FORMAT"),
        (2, "E_MISSING"),
        (3, "E_NONFINITE"),
        (5, "E_TOO_SHORT"),
    ]
    assert np.isnan(vectors[[1, 2, 3, 5]]).all()
    np.testing.assert_allclose(vectors[[0, 4]], slap.embed_audio([waves[0], waves[1]]), atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.embed_audio([], long="half"), "long: found 'half'"),
        (lambda s: s.embed_audio([], on_error="ignore"), "on_error: found 'ignore'"),
        (lambda s: s.classify(noise(1), []), "labels: found none"),
        (lambda s: s.classify(noise(1), "dog,cat"), "labels: found the text 'dog,cat', expected"),
        (lambda s: s.label_vectors("dog"), "labels: found the text 'dog'"),
        (lambda s: s.classify(noise(1), ["dog", 3]), r"labels\[1\]: found 3, expected text"),
        (lambda s: s.classify(noise(1), ["dog", " "]), r"labels\[1\]: found ' '"),
        (lambda s: s.classify(noise(1), ["a"], on_error="no"), "on_error: found 'no'"),
        (lambda s: s.caption(noise(1), on_error="no"), "on_error: found 'no'"),
        (lambda s: s.classify(noise(1), ["a"], "no place"), "template: found 'no place'"),
        (lambda s: s.embed_audio(np.zeros((3, 16_000))), r"shape \(3, 16000\)"),
        (lambda s: s.embed_audio((noise(1), 5)), "E_SAMPLE_RATE"),
    ],
)
def test_bad_arguments_are_named(slap, call, message):
    with pytest.raises(ValueError, match=message):
        call(slap)


def test_classify_gives_probabilities_best_first(slap, waves):
    rows = slap.classify(waves[:2], ["a dog", "a cat", "rain"])
    for row in rows:
        assert list(row.values()) == sorted(row.values(), reverse=True)
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-5)
    assert slap.classify(waves[0], ["a dog", "a cat", "rain"]) == pytest.approx(rows[0], abs=1e-4)


def test_several_templates_are_the_mean_of_their_vectors(slap, waves):
    labels, templates = ["a dog", "a cat", "rain"], ["the sound of {}", "{} on a roof of tin"]
    by_label = [
        slap.embed_text([text.replace("{}", label) for text in templates]) for label in labels
    ]
    mean = np.stack(by_label).mean(1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    assert length.max() < 0.999
    vectors = slap.label_vectors(labels, templates)
    np.testing.assert_allclose(vectors, mean / length, atol=1e-6)
    logits = slap.model.logit_scale.item() * (vectors @ slap.embed_audio(waves[0])[0])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = dict(zip(labels, probabilities, strict=True))
    assert slap.classify(waves[0], labels, templates) == pytest.approx(expected, abs=1e-5)


def test_captions_are_one_per_item(slap, waves):
    captions = slap.caption(waves[:3], max_tokens=5)
    assert len(captions) == 3 and all(isinstance(text, str) for text in captions)
    assert slap.caption(waves[1], max_tokens=5) == captions[1]


def test_a_saved_model_answers_the_same(slap, waves, tmp_path):
    slap.save_pretrained(tmp_path / "model")
    loaded = Slap.from_pretrained(tmp_path / "model")
    assert np.array_equal(loaded.embed_audio(waves), slap.embed_audio(waves))
    assert loaded.card["note"] == "untrained"
    assert np.array_equal(loaded.embed_text(["a dog"]), slap.embed_text(["a dog"]))


def test_a_label_that_comes_twice_counts_once(slap, waves):
    once = slap.classify(waves[:2], ["a dog", "a cat", "rain, wind"])
    twice = slap.classify(waves[:2], ["a dog", "a cat", "a dog", "rain, wind", "a cat"])
    for row, expected in zip(twice, once, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-5)


def test_answers_skip_bad_items_as_vectors_do(slap, waves, tmp_path):
    items = [tmp_path / "missing.wav", waves[0], noise(0.01), waves[1]]
    labels = ["a dog", "rain"]
    for ask in (
        lambda x, **o: slap.classify(x, labels, **o),
        lambda x, **o: slap.caption(x, max_tokens=4, **o),
    ):
        answers, failures = ask(items, on_error="skip")
        assert [(f.index, f.code) for f in failures] == [(0, "E_MISSING"), (2, "E_TOO_SHORT")]
        assert answers[0] is answers[2] is None
        expected = ask([waves[0], waves[1]])
        if isinstance(expected[0], dict):
            expected = [pytest.approx(row, abs=1e-4) for row in expected]
        assert [answers[1], answers[3]] == expected
        with pytest.raises(AudioError, match="E_MISSING"):
            ask(items)


def test_vectors_come_one_after_the_other(slap, waves, tmp_path):
    """In order, each as soon as its windows are done: what follows is not read before."""
    items = [waves[0], tmp_path / "missing.wav", noise(40.0), waves[1], waves[2]]
    expected = slap.embed_files(items)
    taken = []

    class Lazy(list):
        def __getitem__(self, i):
            taken.append(i)
            return super().__getitem__(i)

    small = Slap(slap.model, slap.tokenizer, max_tokens=64)
    for i, (vector, failure, seconds) in enumerate(small.embed_each(Lazy(items))):
        np.testing.assert_allclose(vector, expected.vectors[i], atol=1e-5)
        assert (failure is not None) == (i == 1) and seconds == expected.seconds[i]
        assert len(taken) <= i + 3
