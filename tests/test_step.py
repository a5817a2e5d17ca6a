"""D6: a training step on the Triton kernels has the losses of the reference step."""

from __future__ import annotations

import pytest
import runs
import torch

from slap_fast import ops, runstate
from slap_fast import train as training
from slap_fast.config import override
from slap_fast.data.loader import TrainSteps


def losses_of(steps: int, seed: int) -> torch.Tensor:
    """[steps, 4]: the losses of a run's first steps."""
    config = override(runs.TINY, {"steps": 50, "seed": seed})
    state, words = runstate.begin(config, None, None, runs.CPU)
    data = TrainSteps(runs.clips(), words, state.config)
    found = []
    for state.step in range(steps):
        metrics = training.train_step(state, data[state.step].batches)
        found.append([float(metrics[name]) for name in training.LOSSES])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.slow
def test_the_fused_step_follows_the_reference(figure, monkeypatch) -> None:
    for seed in figure("D6", ci=1, soak=10):
        with monkeypatch.context() as patch:
            want = losses_of(20, seed)
            choose, ran = ops._choose, set()

            def fused(op, impl, *rest, choose=choose, ran=ran):
                if impl is None and "triton" in ops.IMPLEMENTATIONS[op]:
                    impl = "triton"
                chosen = choose(op, impl, *rest)
                ran.add((op, chosen))
                return chosen

            patch.setattr(ops, "_choose", fused)
            found = losses_of(20, seed)
        assert ("map_pool", "triton") in ran
        assert ((found - want).abs() / want.abs()).max() < 1e-5
