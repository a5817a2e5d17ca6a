"""Chunked self-distillation against full matrices of scores, and the collapse alarm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slap_fast.losses import self_distillation
from tests.helpers.losses import CHUNKS, F64, log_softmax, normal, unit


def targets_of(probabilities):
    """Targets with these probabilities [M, K]."""
    logs = probabilities.clamp(min=1e-30).log()
    bias = logs.new_zeros(logs.shape[1])
    prototypes, temperature = torch.eye(len(bias)).to(bias), torch.ones(()).to(bias)
    return self_distillation.Targets(logs, prototypes, bias, temperature)


class TestTargets:
    @CHUNKS
    @pytest.mark.parametrize("iterations", [1, 3])
    def test_sinkhorn_equals_normalising_by_turns(self, iterations, chunk_size):
        features, prototypes = normal(12, 3), normal(5, 3, seed=1)
        expected = np.exp((features @ prototypes.T).numpy() / 0.3)
        for _ in range(iterations):
            expected /= expected.sum(0, keepdims=True)
            expected /= expected.sum(1, keepdims=True)
        targets = self_distillation.sinkhorn(
            features, prototypes, 0.3, iterations, chunk_size=chunk_size
        )
        np.testing.assert_allclose(targets.probabilities().numpy(), expected, rtol=1e-11)

    def test_a_compiled_chunk_equals_the_eager_one(self):
        eager, compiled = (
            self_distillation.sinkhorn(
                normal(12, 3), normal(5, 3, seed=1), 0.3, 3, None, 5, compiled
            )
            for compiled in (False, True)
        )
        torch.testing.assert_close(compiled.bias, eager.bias, rtol=0, atol=1e-12)

    def test_sinkhorn_marginals(self):
        features, prototypes = normal(96, 8), normal(16, 8, seed=1)
        prototypes[:2] += features.mean(0) * 40  # prototypes that every row is closest to
        result = self_distillation.sinkhorn(features, prototypes, 2.0, 50).probabilities()
        np.testing.assert_allclose(result.sum(1), 1.0, rtol=1e-12)
        np.testing.assert_allclose(result.sum(0), 96 / 16, rtol=1e-3)
        assert (features @ prototypes.T / 2.0).softmax(1).sum(0).max() > 3 * 96 / 16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_sinkhorn_of_extreme_scores(self, dtype):
        scores = 400.0 * normal(64, 16).sign()  # scores / temperature = +-1e4
        scores[0] = 400.0
        scores[:, 0] = -400.0
        targets = self_distillation.sinkhorn(scores.to(dtype), torch.eye(16, dtype=dtype), 0.04, 3)
        result = targets.probabilities()
        assert result.dtype == torch.float32 and result.isfinite().all()
        np.testing.assert_allclose(result.sum(1), 1.0, rtol=1e-6)

    def test_sinkhorn_without_rows_and_without_gradient(self):
        no_rows = self_distillation.sinkhorn(torch.zeros(0, 3), torch.zeros(5, 3), 0.1, 3)
        assert no_rows.probabilities().shape == (0, 5)
        inputs = normal(4, 3).requires_grad_(), normal(5, 3).requires_grad_()
        assert not self_distillation.sinkhorn(*inputs, 0.1, 3).probabilities().requires_grad
        with pytest.raises(ValueError, match="iterations: found 0"):
            self_distillation.sinkhorn(*inputs, 0.1, 0)

    def test_centering(self):
        features, prototypes, center = normal(6, 3), normal(5, 3, seed=1), normal(5, seed=2)
        targets = self_distillation.centered_targets(
            features.requires_grad_(), prototypes, center, 0.2
        ).probabilities()
        scores = (features.detach() @ prototypes.T).numpy()
        expected = log_softmax((scores - center.numpy()) / 0.2, 1)
        np.testing.assert_allclose(targets, np.exp(expected), rtol=1e-12)
        assert not targets.requires_grad

    def test_mean_scores(self):
        features, prototypes, center = normal(6, 3), normal(5, 3, seed=1), normal(5, seed=2)
        targets = self_distillation.centered_targets(features, prototypes, center, 0.2)
        expected = (features @ prototypes.T).numpy().mean(0)
        np.testing.assert_allclose(self_distillation.mean_scores(targets), expected, rtol=1e-12)
        no_rows = targets._replace(features=features[:0])
        assert self_distillation.mean_scores(no_rows).isnan().all()


class TestSelfDistillation:
    def inputs(self, rows=10, dtype=F64):
        teacher = unit(rows, 4, seed=3, dtype=dtype), unit(7, 4, seed=4, dtype=dtype)
        targets = self_distillation.sinkhorn(*teacher, 0.2, 2)
        features, prototypes = unit(rows, 6, seed=1, dtype=dtype), unit(7, 6, seed=2, dtype=dtype)
        return features.requires_grad_(), prototypes.requires_grad_(), targets

    @CHUNKS
    def test_formula_and_gradients(self, chunk_size):
        def loss(x, p):
            return self_distillation.self_distillation_loss(x, p, targets, 0.1, chunk_size)[0]

        features, prototypes, targets = inputs = self.inputs()
        scores = features.detach().numpy() @ prototypes.detach().numpy().T / 0.1
        expected = -(targets.probabilities().numpy() * log_softmax(scores, 1)).sum(1).mean()
        assert loss(*inputs[:2]).item() == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.gradcheck(loss, inputs[:2])

    def test_no_rows_give_zero(self):
        features, prototypes, targets = self.inputs(rows=0)
        loss, _ = self_distillation.self_distillation_loss(features, prototypes, targets, 0.1)
        loss.backward()
        assert loss.item() == 0 and features.grad.shape == (0, 6) and not prototypes.grad.any()

    def test_bf16_scores_have_an_fp32_softmax(self):
        features, prototypes, targets = self.inputs(dtype=torch.bfloat16)
        scores = (features @ prototypes.T).to(F64) / 0.1
        loss, _ = self_distillation.self_distillation_loss(features, prototypes, targets, 0.1)
        assert loss.dtype == torch.float32
        expected = F.cross_entropy(scores, targets.probabilities().to(F64))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_products_follow_autocast(self):
        student_bf16 = [x.detach() for x in self.inputs(dtype=torch.bfloat16)[:2]]
        teacher = [x.roll(1, 0) for x in student_bf16]

        def loss(student, teacher):
            targets = self_distillation.sinkhorn(*teacher, 0.1, 3)
            return self_distillation.self_distillation_loss(*student, targets, 0.1)[0]

        with torch.autocast("cpu", torch.bfloat16):
            autocast_loss = loss([x.float() for x in student_bf16], [x.float() for x in teacher])
        assert torch.equal(autocast_loss, loss(student_bf16, teacher))

    def test_extreme_scores_are_finite(self):
        features, prototypes, targets = self.inputs(dtype=torch.float32)
        loss, _ = self_distillation.self_distillation_loss(features, prototypes, targets, 1e-4)
        loss.backward()
        assert loss.isfinite() and features.grad.isfinite().all()

    def test_rejects_shapes(self):
        features, prototypes, targets = self.inputs()
        message = r"targets: found \[10, 7\] rows and prototypes, expected \[9, 7\]"
        with pytest.raises(ValueError, match=message):
            self_distillation.self_distillation_loss(features[1:], prototypes, targets, 0.1)


def clusters(seed, rows=128, width=32, prototypes=64, spread=0.3):
    """Unit features around 10 centres that share a common direction, and unit prototypes."""
    centres = unit(10, width, seed=seed) + unit(1, width, seed=seed + 1000)
    labels = torch.arange(rows) % 10
    noise = spread * unit(rows, width, seed=seed + 2000)
    features = F.normalize(centres[labels] + noise, dim=1)
    return features.float(), unit(prototypes, width, seed=seed + 3000, dtype=torch.float32)


def health_by(targets, student):
    return self_distillation.self_distillation_loss(
        student, unit(len(targets.prototypes), student.shape[1], dtype=student.dtype), targets, 0.1
    )[1]


def health_of(features, prototypes, student=None, targets="sinkhorn", temperature=0.07):
    if targets == "sinkhorn":
        targets = self_distillation.sinkhorn(features, prototypes, temperature, 3)
    else:
        center = torch.zeros(len(prototypes))
        targets = self_distillation.centered_targets(features, prototypes, center, temperature)
    return health_by(targets, features if student is None else student)


def collapse(kind, seed):
    features, prototypes = clusters(seed)
    constant = features[:1] + 1e-4 * unit(*features.shape, seed=seed + 1)
    if kind == "constant_features_sinkhorn":
        return health_of(constant.float(), prototypes)
    if kind == "constant_features_centering":
        return health_of(constant.float(), prototypes, targets="centering")
    if kind == "constant_student":
        return health_of(features, prototypes, student=constant)
    if kind == "one_prototype":
        direction = F.normalize(features.mean(0), dim=0)
        return health_of(features, torch.cat([prototypes[1:], 20 * direction[None]]), targets="raw")
    if kind == "one_prototype_but_for_a_few":
        targets = torch.eye(64)[torch.zeros(1000, dtype=torch.int64)]
        targets[:5] = torch.eye(64)[1:6]
        return health_by(targets_of(targets), unit(1000, 32, seed=seed))
    return health_of(features, 1e-3 * prototypes)  # uniform targets: every score is about 0


COLLAPSES = [
    "constant_features_sinkhorn",
    "constant_features_centering",
    "constant_student",
    "one_prototype",
    "one_prototype_but_for_a_few",
    "uniform_targets",
]


class TestHealth:
    def test_figures_by_hand(self):
        targets = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]], dtype=F64)
        features = torch.tensor([[3.0, 0], [0, 0.5], [0, -2.0]], dtype=F64)
        health = health_by(targets_of(targets), features)
        assert health["prototype_use"].item() == pytest.approx(2 / 3)
        assert health["target_entropy"].item() == pytest.approx(math.log(2) / 3 / math.log(4))
        assert health["marginal_entropy"].item() == pytest.approx(math.log(2) / math.log(4))
        # Unit features (1, 0), (0, 1), (0, -1): mean (1/3, 0), mean square norm 1.
        assert health["feature_std"].item() == pytest.approx(math.sqrt(1 - 1 / 9))

    @pytest.mark.parametrize("kind", COLLAPSES)
    def test_a_collapse_is_caught(self, kind):
        assert all(self_distillation.collapsed(collapse(kind, seed)) for seed in range(5))

    @pytest.mark.parametrize("seed", range(20))
    def test_healthy_data_raise_no_alarm(self, seed):
        rows, spread = (2, 16, 128, 600)[seed % 4], (0.1, 1.0)[seed // 4 % 2]
        features, prototypes = clusters(seed, rows=rows, spread=spread)
        for kind in ("sinkhorn", "centering"):
            for temperature in (0.04, 0.07):
                health = health_of(features, prototypes, targets=kind, temperature=temperature)
                assert not self_distillation.collapsed(health), health

    @pytest.mark.parametrize("rows", [0, 1])
    def test_one_row_has_no_health_figures(self, rows):
        health = health_by(targets_of(torch.eye(4)[:rows]), torch.eye(3)[:rows])
        assert all(value.isnan() for value in health.values())
        assert not self_distillation.collapsed(health)

    def test_collapsed_takes_floats(self):
        health = {name: value.item() for name, value in collapse("one_prototype", 0).items()}
        assert self_distillation.collapsed(health) is True
