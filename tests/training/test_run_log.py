"""What a run writes beside its losses: speed, masked clips, validation figures."""

import json
import sys
from types import ModuleType

import pytest
import torch

from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.diagnostics import flops
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.training.run_log import RunLog, left_out
from slap_fast.training.speed import Speed
from slap_fast.training.step import HEALTH
from tests.helpers import runs

CARD = {
    "retrieval": {"t2a": {"R@1": 0.25}, "chance": {"t2a": {"R@1": 0.1}}},
    "zero_shot": None,
    "n": 4,
    "labels": ["a"],
    "score": 0.5,
}


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_evaluation_is_a_line_of_its_own_once(tmp_path):
    config = override(runs.TINY, {"steps": 5, "eval_every": 2})
    runs.start_or_resume(tmp_path, config, evaluate=lambda _: CARD)
    figures = {"validation/retrieval/t2a/R@1": 0.25, "validation/n": 4, "validation/score": 0.5}
    lines = [row for row in rows_of(tmp_path) if "loss" not in row]
    assert lines == [{"step": step, **figures} for step in (2, 4, 5)]
    runs.start_or_resume(tmp_path, evaluate=lambda _: CARD)
    assert [row for row in rows_of(tmp_path) if "loss" not in row] == lines
    assert [step for step, _ in runs.loss_rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_tensorboard_gets_the_same_figures(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(purge_step)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunLog(tmp_path, 3, writes=True, tensorboard=True) as log:
        log.metrics({"step": 4, "loss": 1.5})
        log.validation(4, CARD)
    assert written[0] == 4 and written[-1] == "closed"
    assert {("loss", 1.5, 4), ("validation/score", 0.5, 4)} <= {*written[1:-1]}


def test_a_step_without_masked_clips_says_so_and_has_no_self_supervised_figures(tmp_path):
    config = override(runs.TINY, {"batch_size": 2, "model.ssl.mask_clips": 0.3})
    runs.start_or_resume(tmp_path, config)
    rows = rows_of(tmp_path)
    assert {row["masked_clips"] for row in rows} >= {0, 1}
    for row in rows:
        own = {"ssl", "collapsed", *HEALTH} & row.keys()
        assert len(own) == (0 if row["masked_clips"] == 0 else 2 + len(HEALTH))


def test_the_speed_is_in_tokens_and_seconds_of_audio(tmp_path):
    runs.start_or_resume(tmp_path, override(runs.TINY, {"steps": 2}))
    for row in rows_of(tmp_path):
        assert row["audio_seconds_per_second"] > 0 and "mfu" not in row
        # 16 frames, 20 ms apart, are 4 tokens.
        seconds = row["tokens_per_second"] * 16 * 0.02 / 4
        assert row["audio_seconds_per_second"] == pytest.approx(seconds)


def test_mfu_is_the_share_of_the_peak_that_the_models_flops_take(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    config = override(runs.TINY, {"precision": "bf16"})
    speed = Speed(config, torch.device("cuda"))
    (batch,) = TrainSteps(runs.clips(), CaptionTokenizer.load(None, 96), config)[0].batches
    tokens = len(batch.audio.patches)
    speed.tokens, now[0] = 3 * tokens, 12.0
    work = flops.step(config.model, config.loss, flops.StepShape.of(batch))
    assert speed.figures([batch])["mfu"] == pytest.approx(3 * work / 2.0 / 989e12)
    assert speed.tokens == 0
    in_fp32 = Speed(override(config, {"precision": "fp32"}), torch.device("cuda"))
    now[0] = 14.0
    assert "mfu" not in in_fp32.figures([batch])


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A1000", None), ("NVIDIA L40S", 362e12)],
)  # fmt: skip
def test_a_peak_is_that_of_the_card_of_that_name(name, peak):
    assert flops.datasheet_peak(name) == peak


def test_clips_left_out_are_named_once(tmp_path):
    clip = {"shard": "/sounds", "key": "a.wav", "code": "E_MISSING"}
    with RunLog(tmp_path, 0, writes=True, tensorboard=False) as log:
        for step in (1, 2):
            log.bad_clips(step, [clip, {**clip, "key": "b.wav"}])
    assert left_out(tmp_path) == {"/sounds/a.wav": "E_MISSING", "/sounds/b.wav": "E_MISSING"}
    assert left_out(tmp_path / "new") == {}
