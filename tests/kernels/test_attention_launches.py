"""How Triton's attention is launched: settings, schedules, devices, CUDA graphs."""

from __future__ import annotations

import math

import pytest
import torch

from slap_fast import ops
from slap_fast.kernels import attention as triton_attention
from tests.helpers import packs
from tests.helpers.packs import DEVICE, Pack, assert_same_bits, starts

LENGTHS = [1, 63, 0, 130]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_setting_of_the_table(figure, head_dim, dtype):
    for seed in figure("K7", ci=1, soak=5):
        torch.manual_seed(seed)
        lengths = [300, 3, 0, 256, 64, 65, 128, 129, 257]
        if dtype == torch.float32 and DEVICE == "cpu" and not figure.soak:
            lengths = [130, 3, 0, 64, 65]  # blocks of 16 and 32, and no limit on the length
        for window in ((-1, -1), (48, 48)):
            options = {"window_size": window}
            Pack(lengths, None, (1, 1), head_dim, dtype, options=options).assert_accurate()
            Pack(lengths, lengths[::-1], (2, 1), head_dim, dtype, options=options).assert_accurate()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_settings_of_other_architectures(figure, monkeypatch, head_dim, dtype, name):
    monkeypatch.setattr(triton_attention, "architecture", lambda device: name)
    options = {"window_size": (48, 48)}
    for seed in figure("K7", ci=1, soak=5):
        torch.manual_seed(seed)
        Pack([257, 3, 0, 130, 64], None, (1, 1), head_dim, dtype, options=options).assert_accurate()


def test_architecture(monkeypatch):
    # Without its cache, so that tests do not see each other's devices.
    architecture = triton_attention.architecture.__wrapped__
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, name in {(8, 0): 80, (8, 9): 80, (9, 0): 90, (10, 3): 100, (12, 0): 80}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert architecture(torch.device("cuda")) == f"sm_{name}"
    assert architecture(torch.device("cpu")) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert architecture(torch.device("cuda")) == "gfx942"
    assert {key[0] for key in triton_attention.SETTINGS} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_the_table_is_sound():
    for settings in triton_attention.SETTINGS.values():
        for short, side in ((settings.forward_short, 1), (settings.backward_short, 0)):
            assert list(short) == sorted(short)
            assert all(limit == setting[side] for limit, setting in short.items())
        tile = triton_attention.TILE.value
        assert tile % settings.forward_tiled.block_q == 0
        assert tile % settings.backward_queries.block_q == 0
        assert tile % settings.backward_keys.block_k == 0


def test_schedule():
    lengths = [1, 0, 128, 129, 300, 0]
    cu_seqlens = starts(lengths)
    schedule = triton_attention.schedule_tiles(cu_seqlens, 570)
    assert schedule.dtype == torch.int32 and schedule.shape == (570 // 128 + 6, 2)
    assert schedule[:7].tolist() == [[0, 0], [2, 0], [3, 0], [3, 1], [4, 0], [4, 1], [4, 2]]
    # Surplus tiles are past the end of the last sequence.
    assert all(s == 5 and tile * 128 >= lengths[5] for s, tile in schedule[7:].tolist())
    assert triton_attention.schedule_tiles(starts([]), 300).shape == (0, 2)


def test_a_schedule_changes_nothing(monkeypatch):
    packs.force(monkeypatch, "tiled")
    pack = Pack([70, 3, 130])
    expected = pack.run(triton_attention, pack.inputs())
    schedule = triton_attention.schedule_tiles(starts(pack.lengths), pack.total + packs.TAIL)

    def forbidden(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(triton_attention, "schedule_tiles", forbidden)
    assert_same_bits(pack.run(triton_attention, pack.inputs(), schedule=schedule), expected)
    with pytest.raises(AssertionError, match="built again"):
        pack.run(triton_attention, pack.inputs())


def test_max_seqlen_only_bounds_the_launches(monkeypatch):
    packs.force(monkeypatch, "mixed")
    pack = Pack([70, 3, 20])
    inputs = pack.inputs()
    results = [
        triton_attention.attention(*inputs, starts(pack.lengths), longest, rope=pack.tables)
        for longest in (70, 5000)
    ]
    assert torch.equal(*results)


def test_through_the_public_operations():
    pack = Pack(LENGTHS, tail=0)
    q, k, v = pack.inputs()
    options = {"rope": pack.tables, "window_size": (48, 48), "return_lse": True}
    actual = ops.attention(q, k, v, starts(LENGTHS), 130, **options, impl="triton")
    qkv = torch.cat((q, k, v), 1)
    packed = ops.attention_qkvpacked(qkv, 2, starts(LENGTHS), 130, **options, impl="triton")
    expected = triton_attention.attention(q, k, v, starts(LENGTHS), 130, **options)
    for a, b, c in zip(actual, packed, expected, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(NotImplementedError, match="head_dim 129, at most 128"):
        x = torch.zeros(3, 1, 129, device=DEVICE)
        ops.attention(x, x, x, starts([3]), 3, impl="triton")


def test_a_schedule_of_other_sequences_is_refused(triton_by_default, monkeypatch):
    qkv, k = torch.zeros(310, 3, 16, device=DEVICE), torch.zeros(70, 1, 16, device=DEVICE)
    mine, theirs = starts([100, 30]), starts([50, 20])
    schedule = ops.attention_schedule(mine, 100, 310)
    schedule_k = ops.attention_schedule(theirs, 50, 70)
    cross = {"cu_seqlens_k": theirs, "max_seqlen_k": 50}
    ops.attention_qkvpacked(qkv, 1, mine, 100, schedule=schedule)
    ops.attention(qkv[:, :1], k, k, mine, 100, schedule=schedule, schedule_k=schedule_k, **cross)
    many = starts([8, 300, 2])
    moved = ops.attention_schedule(starts([2, 8, 300]), 300, 310)
    monkeypatch.setenv("SLAP_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="schedule: found other tiles, expected"):
        ops.attention(*qkv.split(1, 1), many, 300, schedule=moved)
    for other in (
        ops.attention_schedule(mine, 100, 130),
        ops.attention_schedule(mine[:2], 100, 310),
    ):
        with pytest.raises(ValueError, match=r"schedule: found shape \[3, 2\], expected \[4, 2\]"):
            ops.attention_qkvpacked(qkv, 1, mine, 100, schedule=other)
    with pytest.raises(ValueError, match=r"schedule_k: found shape \[4, 2\], expected \[2, 2\]"):
        ops.attention(qkv[:, :1], k, k, mine, 100, schedule_k=schedule, **cross)


def test_the_launches_are_on_the_tensors_device(monkeypatch):
    seen = []

    class Guard:
        def __init__(self, x):
            self.x = x

        def __enter__(self):
            seen.append(self.x)

        def __exit__(self, *_):
            seen.append(None)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    launch = triton_attention._Call.launch

    def checked(self, *arguments):
        assert seen and seen[-1] is not None
        launch(self, *arguments)

    monkeypatch.setattr(triton_attention._Call, "launch", checked)
    pack = Pack([20], tail=0)
    pack.run(triton_attention, pack.inputs())
    assert len(seen) == 4 and seen[0].device.type == DEVICE


@pytest.mark.gpu
def test_cuda_graph():
    pack = Pack([70, 3, 300], head_dim=64, dtype=torch.float16, tail=0)
    q, k, v = (x.detach() for x in pack.inputs())
    cu_seqlens = starts(pack.lengths)
    schedule = triton_attention.schedule_tiles(cu_seqlens, len(q))

    def run():
        return triton_attention.attention(q, k, v, cu_seqlens, 300, schedule=schedule)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, expected)
