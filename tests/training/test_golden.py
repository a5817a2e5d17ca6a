"""D7: fifty steps with golden losses, equal to the last bit, and D8: the collapse alarm."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.data.patches import pack_patches
from slap_fast.losses import self_distillation
from slap_fast.packed import PackedBatch, PackedText
from slap_fast.training.state import begin
from slap_fast.training.step import LOSSES, train_step
from tests.helpers import runs

GOLDEN = Path(__file__).with_name("golden_losses.json")
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # GELU's polynomial is another one with AVX-512
    "OMP_NUM_THREADS": "1",
}
"""Makes torch come to the same bits on every x86 processor."""


def exact_batch(state, step):
    """Eight clips of 1 to 4 columns, made of integers, so that every machine has the same ones."""
    mel, generator = state.config.model.mel, torch.Generator().manual_seed(step)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    lengths = (4 * integers(1, 5, 8)).tolist()
    audio = pack_patches([integers(-256, 256, n, 256) / 128 for n in lengths], mel)
    ids = [[2, *integers(5, 2048, 4 + i).tolist(), 3] for i in range(8)]
    text = PackedText.from_ids(ids)
    starts = audio.cu_seqlens.tolist()
    mask = torch.cat([torch.arange(start, start + 2) for start in starts[:4]])
    groups = torch.arange(8)[:, None]
    return PackedBatch(audio, text, text.next_token_labels(), groups, mask, 4, starts[4])


def golden_losses():
    """The losses of 50 steps, as hexadecimal numbers."""
    config = override(runs.TINY, {"steps": 50})
    state, _ = begin(config, None, None, runs.CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.copy_(torch.randint(-128, 128, parameter.shape, generator=generator) / 512)
        for norm in (m for m in state.model.modules() if "Norm" in type(m).__name__):
            norm.weight.fill_(1.0)
        state.model.log_logit_scale.fill_(2.0)
    state.teacher.load_state_dict(state.model.state_dict(), strict=False)
    losses = []
    for state.step in range(50):
        metrics = train_step(state, [exact_batch(state, state.step)])
        losses.append({name: float(metrics[name]).hex() for name in LOSSES})
    return losses


@pytest.mark.slow
def test_fifty_losses_equal_the_golden_ones(figure):
    """A change that is meant to change them records new ones by
    ``python -m tests.training.test_golden``."""
    golden = json.loads(GOLDEN.read_text())
    if golden["torch"] != torch.__version__:
        pytest.skip(f"the golden losses are those of torch {golden['torch']}")
    for _ in figure("D7", ci=1, soak=3):
        command = [sys.executable, "-m", "tests.training.test_golden", "--print"]
        environment = {**os.environ, **PORTABLE}
        printed = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        assert json.loads(printed) == golden["losses"]


def healthy(seed, steps):
    """A run, and the alarm of each of its steps so far."""
    config = override(runs.TINY, {"seed": seed, "steps": 100, "model.ssl.mask_clips": 1.0})
    state, tokenizer = begin(config, None, None, runs.CPU)
    data = TrainSteps(runs.clips(40), tokenizer, config)
    return state, data, [alarm(state, data) for _ in range(steps)]


def alarm(state, data):
    metrics = train_step(state, data[state.step].batches)
    state.step += 1
    return bool(self_distillation.collapsed(metrics))


@pytest.mark.slow
def test_a_healthy_run_raises_no_alarm(figure):
    """D8, false alarms."""
    for seed in figure("D8", ci=20, soak=200):
        assert not any(healthy(seed, 20)[2])


def constant_features(state):
    with torch.no_grad():
        for layer in state.model.prototype_head.mlp[:-1:2]:
            layer.weight.zero_()
        state.model.audio_encoder.norm.weight.zero_()


def one_prototype(state):
    state.config = override(state.config, {"model.ssl.targets": "centering"})
    state.teacher.center[0] = -1e3


def uniform_targets(state):
    changes = {"targets": "centering", "teacher_temperature": 1e6, "teacher_temperature_warmup": 0}
    state.config = override(state.config, {f"model.ssl.{k}": v for k, v in changes.items()})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "collapse", [constant_features, one_prototype, uniform_targets], ids=lambda f: f.__name__
)
def test_a_collapse_raises_the_alarm(collapse, seed, figure):
    """D8: within 50 steps."""
    for more in figure("D8", ci=1, soak=10):
        state, data, before = healthy(seed + 2 * more, 2)
        collapse(state)
        assert not any(before) and any(alarm(state, data) for _ in range(50))


def test_the_alarm_is_in_the_metrics(tmp_path, monkeypatch):
    real = self_distillation._health
    constant = {"feature_std": torch.tensor(0.0)}
    monkeypatch.setattr(self_distillation, "_health", lambda *args: real(*args) | constant)
    runs.start_or_resume(tmp_path, override(runs.TINY, {"steps": 1}))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["collapsed"] == 1 and math.isfinite(row["loss"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--print"]:
        print(json.dumps(golden_losses()))
    else:
        command = [sys.executable, "-m", "tests.training.test_golden", "--print"]
        printed = subprocess.run(
            command, env={**os.environ, **PORTABLE}, capture_output=True, check=True
        ).stdout
        golden = {"torch": torch.__version__, "losses": json.loads(printed)}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
