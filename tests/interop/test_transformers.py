"""SLAP as transformers' classes: the same numbers, padded or packed, saved, in pipelines."""

import json

import numpy as np
import pytest
import torch

from slap_fast import Slap, losses
from slap_fast.packed import starts_of
from slap_fast.training.state import begin
from tests.helpers.runs import SMALL

TEXTS = ["a dog barks", "rain on a roof of tin", "x"]
LENGTHS = (16_000, 4_000, 30_000)


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(n).astype(np.float32) for n in LENGTHS]


@pytest.fixture(scope="module")
def slap():
    state, words = begin(SMALL, None, None, torch.device("cpu"))
    return Slap(state.model, words, {"retrieval": {"t2a": {"R@1": 0.5}}, "n": 3, "n_expected": 3})


@pytest.fixture(scope="module")
def pair(slap):
    from slap_fast.interop.transformers import from_native

    return from_native(slap.model, slap.tokenizer, slap.card)


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for part in pair:
        part.save_pretrained(folder)
    return folder


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def test_features_are_those_of_slap_and_padded_equals_packed(slap, pair, clips):
    model, processor = pair
    padded = processor(text=TEXTS, audio=clips)
    assert padded["input_features"].shape[:2] == padded["input_features_mask"].shape
    out = model(**padded)
    packed = processor.feature_extractor(clips, packed=True)
    ids = slap.tokenizer.encode(TEXTS)
    packed["input_ids"] = torch.tensor(sum(ids, []))
    packed["text_cu_seqlens"] = starts_of(list(map(len, ids)))
    dense = model(**packed)
    mask = padded["input_features_mask"]
    for name in ("audio_embeds", "text_embeds", "logits_per_audio"):
        assert relative(out[name], dense[name]) < 1e-5, name
    rows = out.audio_model_output.last_hidden_state
    assert relative(rows[mask], dense.audio_model_output.last_hidden_state) < 1e-5
    assert not rows[~mask].any()
    assert relative(out.audio_embeds, torch.from_numpy(slap.embed_audio(clips))) < 1e-5
    assert relative(out.text_embeds, torch.from_numpy(slap.embed_text(TEXTS))) < 1e-5


def test_gradients_of_padded_and_packed_are_equal(pair, clips):
    model, processor = pair
    padded, packed = (processor.feature_extractor(clips, packed=packed) for packed in (False, True))
    grads = []
    for batch in (padded, packed):
        model.zero_grad()
        features = model.get_audio_features(**batch).pooler_output
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert relative(*grads) < 1e-5
    model.zero_grad()


@torch.no_grad()
def test_the_loss_is_the_contrastive_one(pair, clips):
    model, processor = pair
    out = model(**processor(text=TEXTS, audio=clips), return_loss=True)
    expected = losses.contrastive_loss(out.audio_embeds, out.text_embeds, model.slap.logit_scale)
    assert torch.equal(out.loss, expected)
    assert torch.equal(out.logits_per_text, out.logits_per_audio.T)
    assert model(**processor(text=TEXTS)).to_tuple()[0].shape == (3, 32)
    assert model(**processor(text=TEXTS, audio=clips), return_dict=False)[0].shape == (3, 3)


@torch.no_grad()
def test_a_saved_folder_loads_through_the_auto_classes(pair, folder, clips):
    from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, AutoTokenizer

    model, processor = pair
    batch = processor(text=TEXTS, audio=clips)
    again = AutoModel.from_pretrained(folder).eval()
    both = AutoProcessor.from_pretrained(folder)(text=TEXTS, audio=clips)
    assert {n: v.tolist() for n, v in both.items()} == {n: v.tolist() for n, v in batch.items()}
    assert torch.equal(again(**both).logits_per_audio, model(**batch).logits_per_audio)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    assert ids == processor.tokenizer(TEXTS)["input_ids"]
    features = AutoFeatureExtractor.from_pretrained(folder)(clips)["input_features"]
    assert torch.equal(features, batch["input_features"])


def test_a_folder_is_ready_for_a_hub(folder):
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert json.loads((folder / "config.json").read_text())["model_type"] == "slap"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "| retrieval.t2a.R@1 | 0.5 |" in card and "3 of 3 clips evaluated" in card


def test_convert_writes_the_same_model(slap, tmp_path, clips):
    from transformers import AutoModel

    from slap_fast.interop.transformers import convert

    slap.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hub")
    state = AutoModel.from_pretrained(tmp_path / "hub").slap.state_dict()
    assert all(torch.equal(state[name], x) for name, x in slap.model.state_dict().items())


def test_pipelines_run(slap, folder, clips):
    from transformers import pipeline

    classify = pipeline("zero-shot-audio-classification", model=str(folder))
    scores = classify(clips[0], candidate_labels=["dog", "rain"], hypothesis_template="sound of {}")
    expected = slap.classify(clips[0], ["dog", "rain"], "sound of {}")
    assert {row["label"]: row["score"] for row in scores} == pytest.approx(expected, abs=1e-5)
    extract = pipeline("feature-extraction", model=str(folder))
    assert np.allclose(extract(TEXTS[0]), slap.embed_text(TEXTS[0]), atol=1e-5)


def test_the_tokenizer_gives_the_same_ids(slap, pair):
    texts = [*TEXTS, "word " * 200, "", "äé 日本"]
    batch = pair[1](text=texts)
    lengths = batch["attention_mask"].sum(1).tolist()
    ids = [row[:n] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    assert ids == slap.tokenizer.encode(texts)


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less(pair, clips):
    model, processor = pair
    batch = processor(text=TEXTS, audio=clips)
    grads, kept = [], []
    model.train()
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        sizes = []

        def pack(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**batch, return_loss=True).loss
        loss.backward()
        kept.append(sum(sizes))
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    model.gradient_checkpointing_disable()
    model.eval().zero_grad()
    assert relative(grads[1], grads[0]) < 1e-5
    assert kept[1] < 0.7 * kept[0]


@torch.no_grad()
def test_bf16_is_close(pair, folder, clips):
    from transformers import AutoModel

    model, processor = pair
    batch = processor(text=TEXTS, audio=clips)
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()(**batch)
    full = model(**batch)
    for name in ("audio_embeds", "text_embeds"):
        cosine = torch.nn.functional.cosine_similarity(half[name].float(), full[name])
        assert cosine.min() > 0.999, name


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles(pair, clips):
    model, processor = pair
    batch = processor(text=TEXTS, audio=clips)
    compiled = torch.compile(model, backend="eager")
    assert relative(compiled(**batch).logits_per_audio, model(**batch).logits_per_audio) < 1e-5


def test_another_rate_is_resampled(pair, clips):
    extract = pair[1].feature_extractor
    tone = np.sin(2 * np.pi * 440 * np.arange(32_000) / 32_000).astype(np.float32)
    features = extract(tone, sampling_rate=32_000)["input_features"]
    expected = extract(tone[::2])["input_features"]
    assert features.shape == expected.shape
    assert float((features - expected).abs().mean()) < 0.1


def test_mistakes_are_named(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="input_features: found a packed run"):
        model.get_audio_features(torch.zeros(8, 256))
    with pytest.raises(ValueError, match=r"input_ids: found a mask of shape \[1, 3\]"):
        model.get_text_features(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3))


def test_the_extractor_pads_as_pipelines_do():
    from transformers.pipelines.base import pad_collate_fn

    from slap_fast.interop.processing import SlapFeatureExtractor

    extractor = SlapFeatureExtractor()
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    items = [extractor(noise[:length], 16_000) for length in (8_000, 16_000, 32_000)]
    batch = pad_collate_fn(None, extractor)([dict(item) for item in items])
    for i, item in enumerate(items):
        length = item["input_features"].shape[1]
        assert torch.equal(batch["input_features"][i, :length], item["input_features"][0])
        assert not batch["input_features_mask"][i, length:].any()
