"""Steps of packed batches: order, resuming, workers, cache, token budget, bad clips."""

import dataclasses
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from slap_fast.config import override, slap_tiny
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.loader import TrainSteps, steps_from
from slap_fast.data.manifest import read_manifest
from slap_fast.data.patch_cache import PatchCache
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.data.sources.files import ManifestClips
from slap_fast.models.tokenizer import CaptionTokenizer

SETTINGS = {"steps": 6, "batch_size": 5, "seed": 7, "model.ssl.mask_clips": 1.0}
CONFIG = override(slap_tiny(), SETTINGS)


@pytest.fixture(scope="module")
def source():
    return BuiltinClips(SoundSet("train", 12, max_seconds=3.0))


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.load(None, 96)


def tensors(steps):
    """Every tensor of every batch, in order."""
    return [
        value
        for step in steps
        for batch in step.batches
        for value in (*batch.audio, *batch.text, *batch[2:])
        if isinstance(value, torch.Tensor)
    ]


def same(a, b):
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_epoch_has_every_clip_once_and_the_next_another_order(source, tokenizer):
    data = TrainSteps(source, tokenizer, CONFIG)
    drawn = [clip for step in range(len(data)) for clip in data.clips_of(step)]
    first, second = ([i for e, i in drawn if e == epoch] for epoch in (0, 1))
    assert sorted(first) == list(range(12)) and sorted(second) == list(range(12))
    assert first != second


def test_order_depends_on_the_seed_alone(source, tokenizer):
    a, b = (TrainSteps(source, tokenizer, CONFIG) for _ in range(2))
    assert [a.clips_of(s) for s in (5, 0, 3)] == [b.clips_of(s) for s in (5, 0, 3)]
    other = TrainSteps(source, tokenizer, dataclasses.replace(CONFIG, seed=8))
    assert a.clips_of(0) != other.clips_of(0)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_batch(source, tokenizer, workers):
    data = TrainSteps(source, tokenizer, CONFIG)
    assert same(list(steps_from(data, 0, workers)), [data[i] for i in range(6)])


def test_an_open_loader_does_not_keep_the_process_alive(tmp_path):
    """The traceback of a notebook's last error holds one."""
    (tmp_path / "hold.py").write_text(
        "import builtins\n"
        "from slap_fast.config import slap_tiny\n"
        "from slap_fast.data.sources.builtin import BuiltinClips\n"
        "from slap_fast.data.loader import TrainSteps, steps_from\n"
        "from slap_fast.data.builtin.sound_set import SoundSet\n"
        "from slap_fast.models.tokenizer import CaptionTokenizer\n"
        "source = BuiltinClips(SoundSet('train', 4, max_seconds=2.0))\n"
        "tokenizer = CaptionTokenizer.load(None, 96)\n"
        "builtins.held = steps_from(TrainSteps(source, tokenizer, slap_tiny()), 0, 1)\n"
        "next(builtins.held)\n"
    )
    program = [sys.executable, tmp_path / "hold.py"]
    done = subprocess.run(program, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_resuming_at_a_step_gives_the_remaining_batches(source, tokenizer):
    uninterrupted = list(steps_from(TrainSteps(source, tokenizer, CONFIG), 0, 0))
    assert same(list(steps_from(TrainSteps(source, tokenizer, CONFIG), 4, 0)), uninterrupted[4:])


def test_cached_patches_give_the_same_batches(source, tokenizer):
    cache = PatchCache.build(source, CONFIG, workers=0, progress=False)
    decoded, cached = (TrainSteps(source, tokenizer, CONFIG, c) for c in (None, cache))
    assert same([cached[i] for i in range(6)], [decoded[i] for i in range(6)])
    small = override(CONFIG, {"data.cache_gb": 0.0})
    assert PatchCache.build(source, small, workers=0, progress=False) is None


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # there may be no GPU to pin for
@pytest.mark.parametrize(
    ("cache_gb", "max_seconds", "device", "processes"),
    [(1.0, 3.0, "cpu", 0), (1.0, 3.0, "cuda", 1), (1.0, 2.0, "cpu", 1), (0.0, 3.0, "cpu", 1)],
    ids=["whole", "gpu", "in_part", "none"],
)
def test_cached_steps_need_no_workers_on_a_cpu(
    source, tokenizer, cache_gb, max_seconds, device, processes
):
    config = override(CONFIG, {"data.cache_gb": cache_gb, "data.max_seconds": max_seconds})
    cache = PatchCache.build(source, config, workers=0, progress=False)
    data = TrainSteps(source, tokenizer, config, cache)
    before = set(multiprocessing.active_children())
    steps = steps_from(data, 0, 1, torch.device(device))
    assert len(set(multiprocessing.active_children()) - before) == processes
    assert same([next(steps)], [data[0]])


def test_a_cache_holds_each_clip_once_and_no_more_than_it_has_room_for(source):
    cache = PatchCache.build(source, CONFIG, workers=0, progress=False)
    patches = [cache.get(i)[0] for i in range(len(source))]
    assert sum(x.nbytes for x in patches) == cache._patches.nbytes and cache._patches.is_shared()
    cache.add(99, torch.zeros(1, 256), ())
    assert cache.get(99) is None


def test_clips_that_are_all_too_long_have_no_cache(source):
    short = override(CONFIG, {"data.max_seconds": 0.1})
    assert PatchCache.build(source, short, workers=0, progress=False) is None


def test_a_batch_over_the_token_budget_is_split_and_loses_nothing(source, tokenizer):
    config = dataclasses.replace(CONFIG, max_tokens=130)
    one, split = (TrainSteps(source, tokenizer, c)[0].batches for c in (CONFIG, config))
    assert len(one) == 1 and len(split) > 1
    assert all(len(batch.audio.patches) <= 130 for batch in split)
    assert sum(len(batch.audio.patches) for batch in split) == len(one[0].audio.patches)
    assert sum(len(batch.groups) for batch in split) == 5


def test_a_budget_below_one_clip_is_refused(source, tokenizer):
    with pytest.raises(ValueError, match=r"max_tokens: found 8, expected at least \d+"):
        TrainSteps(source, tokenizer, dataclasses.replace(CONFIG, max_tokens=8))


def test_masks_cover_half_of_each_clip(source, tokenizer):
    batch = TrainSteps(source, tokenizer, CONFIG)[0].batches[0]
    cu = batch.audio.cu_seqlens
    mask = torch.zeros(len(batch.audio.patches), dtype=torch.bool)
    mask[batch.mask_indices] = True
    shares = [mask[a:b].float().mean() for a, b in zip(cu[:-1], cu[1:], strict=True)]
    assert all(abs(float(share) - 0.5) <= 0.26 for share in shares)
    assert len(batch.mask_indices) == int(mask.sum())
    few = override(CONFIG, {"model.ssl.mask_clips": 0.3})
    data = TrainSteps(source, tokenizer, few)
    masked = [len(data._clip(epoch, i).mask) > 0 for epoch in range(4) for i in range(12)]
    assert 5 < sum(masked) < 25
    batch = data[0].batches[0]
    starts, tokens = batch.audio.cu_seqlens.tolist(), batch.masked_tokens
    per_clip = [
        int(((batch.mask_indices >= a) & (batch.mask_indices < b)).sum())
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    assert all(per_clip[: batch.masked_clips]) and not any(per_clip[batch.masked_clips :])
    assert starts[batch.masked_clips] == tokens == len(batch.masked_audio.patches)
    without = override(CONFIG, {"loss.ssl": 0.0})
    assert len(TrainSteps(source, tokenizer, without)[0].batches[0].mask_indices) == 0


def test_labels_are_the_next_tokens_of_each_caption(source, tokenizer):
    text = TrainSteps(source, tokenizer, CONFIG)[0].batches[0].text
    labels = text.next_token_labels()
    for a, b in zip(text.cu_seqlens[:-1], text.cu_seqlens[1:], strict=True):
        assert labels[a : b - 1].tolist() == text.ids[a + 1 : b].tolist()
        assert labels[b - 1] == -100
        assert (text.ids[a], text.ids[b - 1]) == (tokenizer.start_id, tokenizer.end_id)


@pytest.fixture
def folder(tmp_path):
    """Four files: two of one caption, one that is not audio, one of 3 s."""
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 0.5), ("b", 0.7), ("long", 3.0)):
        noise = 0.1 * rng.standard_normal(round(16_000 * seconds))
        soundfile.write(tmp_path / f"{name}.wav", noise, 16_000)
    (tmp_path / "bad.wav").write_bytes(b"<html>not audio</html>")
    captions = {"a": "a hiss", "b": "A hiss", "long": "a long hiss", "bad": "nothing"}
    rows = "".join(f"{name}.wav,{caption}\n" for name, caption in captions.items())
    (tmp_path / "m.csv").write_text(f"path,caption\n{rows}")
    return ManifestClips(read_manifest(tmp_path / "m.csv"))


def test_a_bad_file_is_left_out_counted_and_named(folder, tokenizer):
    config = override(CONFIG, {"batch_size": 4, "steps": 1})
    step = TrainSteps(folder, tokenizer, config)[0]
    assert step.seen == 4 and sum(len(batch.groups) for batch in step.batches) == 3
    assert [(clip.code, clip.key, clip.bytes) for clip in step.bad] == [("E_FORMAT", "bad.wav", 22)]
    cache = PatchCache.build(folder, config, workers=0, progress=False)
    assert TrainSteps(folder, tokenizer, config, cache)[0].bad == step.bad


def test_equal_captions_share_a_group_and_a_small_set_is_one_batch(folder, tokenizer):
    config = override(CONFIG, {"batch_size": 64, "steps": 1})
    step = TrainSteps(folder, tokenizer, config)[0]
    assert step.seen == 4
    assert len(step.batches[0].groups[:, 0].unique()) == 2


def test_a_short_wording_is_a_positive_of_every_clip_of_its_source(tokenizer):
    source = BuiltinClips(SoundSet("train", 300, max_seconds=2.0))
    data = TrainSteps(source, tokenizer, override(CONFIG, {"batch_size": 300, "steps": 1}))
    clips = [data._clip(0, index) for index in range(300)]
    shorts = sum(isinstance(clip.caption_keys[0], str) for clip in clips)
    assert 10 < shorts < 100
    groups = data._batch(clips).groups
    for clip, group in zip(clips, groups[:, 0], strict=True):
        if isinstance(clip.caption_keys[0], str):
            positives = [i for i in range(300) if source.label(i) == clip.caption_keys[0]]
            assert (groups == group).any(1).nonzero().flatten().tolist() == positives


def test_a_long_clip_is_cropped_at_random_by_epoch(folder, tokenizer):
    config = override(CONFIG, {"batch_size": 4, "steps": 3, "data.max_seconds": 1.0})
    cache = PatchCache.build(folder, config, workers=0, progress=False)
    data = TrainSteps(folder, tokenizer, config, cache)
    lengths = [data[i].batches[0].audio.max_seqlen for i in range(3)]
    assert lengths == [config.model.mel.num_patches(16_000)] * 3
    crops = [data._clip(epoch, 2).patches for epoch in (0, 1)]
    assert not torch.equal(*crops)
