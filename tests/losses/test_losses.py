"""Losses against formulas written in numpy float64, gradients against finite differences."""

from __future__ import annotations

import math
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slap_fast import losses
from slap_fast.losses import self_distillation

F64 = torch.float64
SCALE, BIAS = torch.tensor(7.0, dtype=F64), torch.tensor(-3.0, dtype=F64)


def unit(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=F64), dim=-1).to(dtype)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log_softmax(x, axis):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


class Peak(TorchDispatchMode):
    """The most elements that were alive at once, of what was made inside, in our operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "slap_fast":
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *arguments, **keywords or {})
        result = function(*arguments, **keywords or {})
        inputs = {id(x) for x in tree_leaves((arguments, keywords))}
        for made in tree_leaves(result):
            if not isinstance(made, torch.Tensor) or id(made) in inputs or function.is_view:
                continue
            self.live += made.numel()
            self.most = max(self.most, self.live)
            weakref.finalize(made, self.free, made.numel())
        return result

    def free(self, elements: int) -> None:
        self.live -= elements


GROUPS = [None, [0, 1, 2, 3, 4], [3, 1, 3, 0, 3], [2, 2, 2, 2, 2]]
GROUP_IDS = ["no_groups", "distinct", "three_equal", "all_equal"]


@pytest.mark.parametrize("groups", GROUPS, ids=GROUP_IDS)
class TestPairFormulas:
    def pairs(self, groups):
        audio, text = unit(5, 8, seed=1), unit(5, 8, seed=2)
        numbers = range(5) if groups is None else groups
        right = [[i for i in range(5) if numbers[i] == n] for n in numbers]
        return audio, text, right, None if groups is None else torch.tensor(groups)

    def test_contrastive(self, groups):
        audio, text, right, groups = self.pairs(groups)
        logits = 7.0 * audio.numpy() @ text.numpy().T
        rows, columns = log_softmax(logits, 1), log_softmax(logits, 0)
        to_text = [-np.mean([rows[i, j] for j in js]) for i, js in enumerate(right)]
        to_audio = [-np.mean([columns[j, i] for j in js]) for i, js in enumerate(right)]
        loss = losses.contrastive_loss(audio, text, SCALE, groups=groups)
        assert loss.item() == pytest.approx((np.mean(to_text) + np.mean(to_audio)) / 2, abs=1e-12)

    def test_sigmoid(self, groups):
        audio, text, right, groups = self.pairs(groups)
        total = 0.0
        for i in range(5):
            for j in range(5):
                logit = 7.0 * float(audio[i] @ text[j]) - 3.0
                total += math.log1p(math.exp(-logit if j in right[i] else logit))
        loss = losses.sigmoid_contrastive_loss(audio, text, SCALE, BIAS, groups=groups)
        assert loss.item() == pytest.approx(total / 5, abs=1e-12)

    def test_gradients(self, groups):
        audio, text, _, groups = self.pairs(groups)
        inputs = [x.clone().requires_grad_() for x in (audio, text, SCALE, BIAS)]

        def both(audio, text, scale, bias):
            return losses.contrastive_loss(
                audio, text, scale, groups=groups
            ), losses.sigmoid_contrastive_loss(audio, text, scale, bias, groups=groups)

        assert torch.autograd.gradcheck(both, inputs)


class TestPairs:
    def test_equals_clip(self):
        audio, text = unit(6, 8, seed=1), unit(6, 8, seed=2)
        logits, own = SCALE * audio @ text.T, torch.arange(6)
        expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        torch.testing.assert_close(
            losses.contrastive_loss(audio, text, SCALE), expected, rtol=0, atol=1e-12
        )

    def test_identical_captions_do_not_push_apart(self):
        """Two clips of one caption, aligned with it: nothing is left to learn."""
        base = torch.eye(4, dtype=F64)
        text = base[[0, 0, 1, 2]]
        groups = torch.tensor([5, 5, 1, 2])
        scale = torch.tensor(100.0, dtype=F64)

        def gradient(loss, *arguments, **keywords):
            audio = text.clone().requires_grad_()
            loss(audio, text, scale, *arguments, **keywords).backward()
            return audio.grad.abs().max().item()

        middle = torch.tensor(-50.0, dtype=F64)
        assert gradient(losses.contrastive_loss, groups=groups) < 1e-12
        assert gradient(losses.sigmoid_contrastive_loss, middle, groups=groups) < 1e-12
        assert gradient(losses.sigmoid_contrastive_loss, middle) > 1
        # Softmax cannot tell two equal columns apart, but it pays for the tie; with groups the
        # loss is the entropy of its targets and no less.
        assert losses.contrastive_loss(text, text, scale, groups=groups).item() == pytest.approx(
            math.log(2) / 2
        )
        one_apart = text.clone()
        one_apart[0], one_apart[1] = base[0], base[3]
        with_groups = losses.contrastive_loss(text, one_apart, scale, groups=groups)
        assert with_groups > losses.contrastive_loss(text, text, scale, groups=groups) + 1

    @pytest.mark.parametrize("batch", [0, 1])
    def test_tiny_batches_have_no_contrast(self, batch):
        audio = unit(batch, 8).requires_grad_()
        loss = losses.contrastive_loss(audio, unit(batch, 8, seed=1), SCALE)
        loss.backward()
        assert loss.item() == 0 and audio.grad.shape == (batch, 8) and not audio.grad.any()
        pair = losses.sigmoid_contrastive_loss(audio, unit(batch, 8, seed=1), SCALE, BIAS)
        assert math.isfinite(pair.item()) and (pair.item() == 0) == (batch == 0)

    @pytest.mark.parametrize("scale", [1e4, -1e4])
    def test_extreme_logits_are_finite(self, scale):
        audio = unit(6, 8, seed=1, dtype=torch.float32).requires_grad_()
        text, scale = unit(6, 8, seed=2, dtype=torch.float32), torch.tensor(scale)
        both = losses.contrastive_loss(audio, text, scale)
        both = both + losses.sigmoid_contrastive_loss(audio, text, scale, torch.tensor(-10.0))
        both.backward()
        assert both.isfinite() and audio.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_computes_in_fp32(self, dtype):
        audio, text = unit(16, 64, seed=1, dtype=dtype), unit(16, 64, seed=2, dtype=dtype)
        scale = torch.tensor(100.0)
        expected = losses.contrastive_loss(audio.to(F64), text.to(F64), scale.to(F64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses.contrastive_loss(audio, text, scale)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=2e-6)

    def test_a_caption_that_fits_several_clips_is_right_for_each(self):
        """Text 1 also fits audio 0; text 0 does not fit audio 1."""
        audio, text = unit(3, 8), unit(3, 8, seed=1)
        groups = torch.tensor([[0, 1], [1, 1], [2, 2]])
        right = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
        logits = SCALE.item() * audio.numpy() @ text.numpy().T
        rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
        expected = -(rows * right / right.sum(1, keepdims=True)).sum() / 6
        expected -= (columns * right / right.sum(0, keepdims=True)).sum() / 6
        loss = losses.contrastive_loss(audio, text, SCALE, groups=groups)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        signs = 2 * right - 1
        expected = np.log1p(np.exp(-signs * (logits + BIAS.item()))).sum() / 3
        loss = losses.sigmoid_contrastive_loss(audio, text, SCALE, BIAS, groups=groups)
        assert loss.item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        ("text_shape", "groups", "name"),
        [((4, 8), None, "text_features"), ((5, 7), None, "text_features"), ((5, 8), 4, "groups")],
        ids=["rows", "width", "groups"],
    )
    def test_rejects_shapes(self, text_shape, groups, name):
        groups = None if groups is None else torch.arange(groups)
        with pytest.raises(ValueError, match=f"{name}: found shape"):
            losses.contrastive_loss(unit(5, 8), unit(*text_shape), SCALE, groups=groups)


CHUNKS = pytest.mark.parametrize("chunk_size", [1, 4, 5, 100], ids=lambda n: f"chunks_of_{n}")


class TestCaption:
    def inputs(self, dtype=F64):
        labels = torch.tensor([3, -100, 0, 10, -100, 5, 5, -100, 1, 2, 9])
        hidden, weight = normal(11, 6, seed=1).to(dtype), normal(11, 6, seed=2).to(dtype)
        return hidden.requires_grad_(), weight.requires_grad_(), labels

    @CHUNKS
    def test_formula_and_gradients(self, chunk_size):
        hidden, weight, labels = self.inputs()
        log_probs = log_softmax(hidden.detach().numpy() @ weight.detach().numpy().T, 1)
        expected = -np.mean([log_probs[i, y] for i, y in enumerate(labels.tolist()) if y >= 0])
        loss = losses.caption_loss(hidden, weight, labels, chunk_size=chunk_size)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.gradcheck(
            lambda h, w: losses.caption_loss(h, w, labels, chunk_size=chunk_size), (hidden, weight)
        )

    def test_equals_cross_entropy_with_another_ignored_label(self):
        hidden, weight, labels = self.inputs()
        labels = labels.clamp(min=0)
        loss = losses.caption_loss(hidden, weight, labels, ignore_index=5, chunk_size=3)
        expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=5)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(loss, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("rows", [0, 11], ids=["no_rows", "all_ignored"])
    @pytest.mark.parametrize("chunk_size", [3, 100], ids=["chunks", "one_chunk"])
    def test_no_label_gives_zero(self, rows, chunk_size):
        hidden, weight, labels = self.inputs()
        labels = torch.full_like(labels, -100)[:rows]
        loss = losses.caption_loss(hidden[:rows], weight, labels, chunk_size=chunk_size)
        loss.backward()
        assert loss.item() == 0 and not weight.grad.any() and not hidden.grad.any()

    def test_extreme_logits_are_finite(self):
        hidden, weight, labels = self.inputs(torch.float32)
        loss = losses.caption_loss(1e4 * hidden, weight, labels, chunk_size=4)
        loss.backward()
        assert loss.isfinite() and weight.grad.isfinite().all()

    def test_bf16_logits_meet_an_fp32_softmax(self):
        hidden, weight, labels = self.inputs(torch.bfloat16)
        expected = F.cross_entropy((hidden @ weight.T).to(F64), labels)
        loss = losses.caption_loss(hidden, weight, labels)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_chunks_agree_under_autocast(self):
        hidden, weight, labels = self.inputs(torch.float32)

        def run(chunk_size):
            with torch.autocast("cpu", torch.bfloat16):
                loss = losses.caption_loss(hidden, weight, labels, chunk_size=chunk_size)
            return loss, *torch.autograd.grad(loss, (hidden, weight))

        whole, pieces = run(100), run(4)
        exact = losses.caption_loss(hidden, weight, labels)
        assert whole[0].dtype == torch.float32 and pieces[0].item() == pytest.approx(
            whole[0].item(), rel=1e-6
        )
        assert whole[0].item() == pytest.approx(exact.item(), rel=2**-8)
        for ours, theirs in zip(pieces[1:], whole[1:], strict=True):
            assert (ours - theirs).norm() < 2**-8 * theirs.norm()

    @pytest.mark.parametrize("rows", [0, 3, 11], ids=lambda n: f"{n}_rows")
    def test_liger_equals_whole_logits(self, rows, monkeypatch):
        pytest.importorskip("liger_kernel")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        hidden, weight, labels = self.inputs(torch.float32)
        wanted = F.cross_entropy(hidden[:rows] @ weight.T, labels[:rows], reduction="sum")
        wanted = wanted / (labels[:rows] != -100).sum().clamp(min=1)
        found = losses.caption_loss(hidden[:rows], weight, labels[:rows], impl="liger")
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        for ours, theirs in zip(
            torch.autograd.grad(found, (hidden, weight)),
            torch.autograd.grad(wanted, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("there", [False, True], ids=["not_installed", "no_gpu"])
    def test_liger_is_refused_where_it_does_not_fit(self, there, monkeypatch):
        if there:
            pytest.importorskip("liger_kernel")
        else:
            monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        found = "liger on cpu, expected .* a GPU" if there else "liger, expected .* installed"
        with pytest.raises(ValueError, match=f"impl: found {found}"):
            losses.caption_loss(*self.inputs(torch.float32), impl="liger")
        with pytest.raises(ValueError, match="impl: found 'cut', expected blockwise or liger"):
            losses.caption_loss(*self.inputs(), impl="cut")

    def test_rejects_shapes(self):
        hidden, weight, labels = self.inputs()
        with pytest.raises(ValueError, match=r"labels: found shape \[10\], expected \[11\]"):
            losses.caption_loss(hidden, weight, labels[1:])


class TestTotal:
    weights = SimpleNamespace(contrastive=1.0, ssl=2.0, caption=0.5)

    def test_weighted_sum(self):
        parts = {"contrastive": torch.tensor(3.0), "ssl": torch.tensor(5.0)}
        assert losses.total_loss(parts, self.weights).item() == 13.0
        parts["caption"] = torch.tensor(8.0)
        assert losses.total_loss(parts, self.weights).item() == 17.0

    def test_weight_0_leaves_out_even_nan(self):
        weights = SimpleNamespace(contrastive=1.0, ssl=0.0, caption=0.0)
        parts = {"contrastive": torch.tensor(3.0), "ssl": torch.tensor(math.nan)}
        assert losses.total_loss(parts, weights).item() == 3.0
        with pytest.raises(ValueError, match="expected one with a weight above 0"):
            losses.total_loss({"ssl": parts["ssl"]}, weights)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="losses: found 'clap'"):
            losses.total_loss({"clap": torch.tensor(1.0)}, self.weights)


ROWS, WIDTH, COLUMNS = 256, 8, 200
LARGE = {
    "ssl": lambda x, y, size: self_distillation.self_distillation_loss(
        x,
        y,
        self_distillation.sinkhorn(x.roll(1, 0), y.flip(0), 0.1, 3, chunk_size=size),
        0.1,
        size,
    )[0],
    "caption": lambda x, y, size: losses.caption_loss(x, y, torch.arange(ROWS) % 200, -1, size),
    "contrastive": lambda x, y, size: losses.contrastive_loss(
        x, x.flip(0), torch.tensor(9.0), block_size=size
    ),
    "sigmoid": lambda x, y, size: losses.sigmoid_contrastive_loss(
        x, x.flip(0), torch.tensor(9.0), torch.tensor(-9.0), block_size=size
    ),
}


@pytest.mark.parametrize("loss", LARGE.values(), ids=LARGE)
def test_all_logits_never_exist(loss):
    def peak(size):
        rows = unit(ROWS, WIDTH, seed=1).requires_grad_()
        columns = unit(COLUMNS, WIDTH, seed=2).requires_grad_()
        with Peak() as seen:
            loss(rows, columns, size).backward()
        return seen.most

    whole = ROWS * COLUMNS
    assert peak(8) < whole / 2 < whole < peak(ROWS)


def test_everything_compiles_without_a_graph_break():
    def step(audio, text, groups, features, prototypes, teacher, hidden, labels):
        targets = self_distillation.sinkhorn(teacher, prototypes.flip(0), 0.05, 3, chunk_size=4)
        student, health = self_distillation.self_distillation_loss(
            features, prototypes, targets, 0.1, chunk_size=4
        )
        parts = {
            "contrastive": losses.contrastive_loss(audio, text, SCALE, groups=groups)
            + losses.sigmoid_contrastive_loss(audio, text, SCALE, BIAS, groups=groups),
            "ssl": student,
            "caption": losses.caption_loss(hidden, prototypes, labels, chunk_size=4),
        }
        return losses.total_loss(parts, TestTotal.weights), self_distillation.collapsed(health)

    arguments = [unit(5, 8, seed=1), unit(5, 8, seed=2), torch.tensor([0, 1, 1, 2, 3])]
    arguments += [unit(10, 6, seed=3), unit(7, 6, seed=4), unit(10, 6, seed=5)]
    arguments += [normal(9, 6, seed=6), torch.arange(9) % 7]
    for index in (0, 1, 3, 4, 6):
        arguments[index].requires_grad_()
    inputs = [x for x in arguments if x.requires_grad]
    eager, _ = step(*arguments)
    compiled, alarm = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-12)
    assert not alarm
    for ours, theirs in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def transposed(x):
    """The same values, column by column."""
    return x.T.contiguous().T


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed], ids=lambda f: f.__name__)
def test_opcheck(layout, figure):
    """Of each operation that this package registers for its losses."""
    ops = torch.ops.slap_fast
    for seed in figure("K6", ci=1, soak=10):
        rows, taught = (layout(normal(11, 6, seed=seed + i).float()) for i in (0, 1))
        matrix, prototypes = (layout(normal(5, 6, seed=seed + i).float()) for i in (2, 3))
        masses, temperature = normal(5, seed=seed + 4).float(), torch.tensor(0.1)
        groups, columns = torch.arange(11)[:, None] % 5, torch.arange(5)[:, None]
        cases = {
            ops.linear_cross_entropy: (groups[:, 0], [], -100.0),
            ops.linear_distillation: (taught, [prototypes, masses, temperature], 0.2),
            ops.linear_group_cross_entropy: (groups, [columns], 0.0),
            ops.linear_group_sigmoid: (groups, [columns], 0.0),
        }
        for op, of_rows in cases.items():
            learned = rows.requires_grad_(), matrix.requires_grad_()
            how = 4, torch.float32, True, False
            torch.library.opcheck(op.default, (*learned, *of_rows, *how))
        torch.library.opcheck(ops.sinkhorn.default, (taught, prototypes, temperature, 3, 4, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["cross_entropy", "distillation", "group_cross_entropy", "group_sigmoid"]
)
def test_a_block_compiled_is_the_block_as_it_is(name, dtype):
    """What a GPU has under torch.compile; for the products in bf16 too."""
    rows, matrix = unit(10, 6, seed=1).float(), unit(7, 6, seed=2).float()
    columns = torch.tensor([[0], [1], [1], [2], [3], [4], [5]])
    picks = torch.arange(10) % 7
    teacher, bias = unit(7, 6, seed=4).to(dtype), normal(7, seed=5).float()
    inputs = {
        "cross_entropy": (picks.where(picks != 3, -100), [], -100.0),
        "distillation": (unit(10, 6, seed=3).to(dtype), [teacher, bias, torch.tensor(0.07)], 0.1),
    }.get(name, (columns[picks], [columns], 0.0))
    run = getattr(torch.ops.slap_fast, f"linear_{name}").default
    plain, compiled = (
        run(rows, matrix, *inputs, 4, dtype, True, compiled) for compiled in (False, True)
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_repeats_are_bitwise_equal():
    def gradients():
        hidden, weight = normal(300, 32).requires_grad_(), normal(50, 32, seed=1).requires_grad_()
        targets = self_distillation.sinkhorn(
            normal(300, 32, seed=2), normal(50, 32), 0.1, 3, None, 64
        )
        loss, _ = self_distillation.self_distillation_loss(
            hidden, weight, targets, 0.1, chunk_size=64
        )
        loss = loss + losses.caption_loss(hidden, weight, torch.arange(300) % 50, chunk_size=64)
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, (hidden, weight))])

    assert torch.equal(gradients(), gradients())
