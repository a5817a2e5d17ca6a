"""Every target finds its figure in the record of its benchmark: none stays "not run" after a run.

The benchmarks run tiny on the CPU, also those whose records only a GPU writes.
"""

from __future__ import annotations

import pytest

from benchmarks import cases, harness
from benchmarks.model import encoder, step
from benchmarks.ops import attention, attention_peers, map_pool, mel
from benchmarks.report import targets
from slap_fast.config import override
from tests.helpers import runs


def rows_of(name: str) -> list[dict[str, object]]:
    """C1 and C2 as the benchmark runs them on a GPU, with two clips of 1 s."""
    c1, c2 = (case._replace(lengths=[25, 25]) for case in cases.packs()[:2])
    if name == "attention":
        return [
            row
            for case in (c1, c2)
            for window in (cases.WINDOW, (-1, -1))
            for row in attention.rows_of(case, window, rounds=1)
        ]
    benchmark = {"mel": mel, "map_pool": map_pool, "encoder": encoder}[name]
    return list(benchmark.rows_of(c1, rounds=1))


@pytest.fixture(scope="module")
def records():
    """name -> record, as a GPU would leave them and a CPU leaves log-mel's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "device", lambda: runs.CPU)
        patch.setattr(mel, "PEERS", {})  # torch.stft is one
        uncompiled = {name: it | {"compiled": False} for name, it in step.VARIANTS.items()}
        patch.setattr(step, "VARIANTS", uncompiled)
        records = {"mel_cpu": {"rows": rows_of("mel")}}
        peers = dict.fromkeys(attention_peers.VARIANTS, attention_peers.ours)
        patch.setattr(attention, "VARIANTS", peers)
        patch.setattr(harness, "of_floor", lambda floor_ms, ms: floor_ms / ms)
        patch.setitem(mel.IMPLS, "cpu", ("triton",))
        ours = mel.ours
        patch.setattr(mel, "ours", lambda *arguments: ours(*arguments[:-1], "cpp"))
        for name in ("attention", "map_pool", "mel", "encoder"):
            records[f"{name}_gpu"] = {"rows": rows_of(name)}
        config = override(runs.TINY, {"model.ssl.mask_clips": 1.0})
        *_, records["step_gpu"] = step.bench_step(config, 300, 1, runs.CPU)
        records["step_cpu"] = records["step_gpu"]
    return records


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.what)
def test_a_target_reads_what_its_benchmark_writes(records, target):
    assert target.value(records[target.record]) > 0


def test_every_timed_row_has_its_peak_memory(records):
    for name in ("attention_gpu", "map_pool_gpu", "mel_gpu", "encoder_gpu"):
        rows = [row for row in records[name]["rows"] if "ms" in row]
        assert rows and all("peak_MiB" in row for row in rows), name


def test_the_encoder_is_timed_in_every_direction(records):
    ours = [row for row in records["encoder_gpu"]["rows"] if row["variant"] == "slap-fast"]
    assert [row["direction"] for row in ours] == ["forward", "backward", "both"]
    work = [row["ms"] * row["TFLOP/s"] / ours[0]["ms"] / ours[0]["TFLOP/s"] for row in ours]
    assert work == pytest.approx([1, 2, 3])


def test_the_share_of_copy_bandwidth_is_for_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(harness, "device", lambda: runs.CPU)
    assert harness.bandwidth(4.3e9, 2.0) == {"GB/s": 2150.0, "of_floor": None}
    monkeypatch.setattr(harness, "device", lambda: harness.torch.device("cuda"))
    assert harness.bandwidth(4.3e9, 2.0)["of_floor"] == pytest.approx(0.5)


def test_the_step_is_compared_with_its_targets():
    fused = {"way": "fused", "ms": 400.0, "MFU": 0.45, "device days": 1.5}
    slow = {"way": "reference", "ms": 4000.0, "MFU": 0.05, "device days": 15.0}
    record = {"rows": [slow, fused], "parts": {"mel": {"ms": 2.0}}}
    verdicts = {line[0]: line[1:] for line in targets.verdicts({"step_gpu": record})}
    assert verdicts["training step"] == ["at least 0.5 of the peak", "0.45", "missed by 10.0%"]
    projected = verdicts["the paper's pretraining, projected from the step"]
    assert projected == ["at most 2 days", "1.5", "met"]
    beside = verdicts["mel_patches beside a training step, GPU"]
    assert beside == ["at most 0.01 of its time", "0.005", "met"]


def test_the_step_on_a_cpu_is_compared_with_the_compiled_reference():
    compiled = {"way": "compiled reference", "ms": 100.0, "peak MB": 200.0}
    rows = [compiled, {"way": "fused", "ms": 121.0, "peak MB": 180.0}]
    verdicts = targets.verdicts({"step_cpu": {"rows": rows}})
    reached = {line[0]: line[2:] for line in verdicts if "CPU, beside the compiled" in line[0]}
    assert list(reached.values()) == [["1.21", "missed by 10.0%"], ["0.9", "met"]]
    verdicts = targets.verdicts({"step_cpu": {"rows": [{"way": "compiled reference", "note": ""}]}})
    assert {line[3] for line in verdicts} == {"not run"}


def test_the_encoder_is_judged_by_its_best_variant():
    def row(variant, mfu, ms):
        where = {"case": "C1", "direction": "both", "variant": variant}
        return {**where, "mfu": mfu, "ms_256k": ms}

    rows = [row("slap-fast", 0.5, 360.0), row("slap-fast, compiled", 0.6, 300.0)]
    rows += [row("padded", 0.9, 100.0)]
    verdicts = targets.verdicts({"encoder_gpu": {"rows": rows}})
    assert [line[2:] for line in verdicts if line[2]] == [["300", "met"], ["0.6", "met"]]
