"""D6: a training step on the Triton kernels has the losses of the reference step."""

from __future__ import annotations

import pytest
import runs
import torch

from slap_fast import ops, runstate
from slap_fast import train as training
from slap_fast.config import override
from slap_fast.data.loader import TrainSteps

SMALLER = {  # half the programs, or less, to interpret
    "model.audio.num_heads": 1,
    "model.text.num_heads": 1,
    "model.caption.num_heads": 1,
    "batch_size": 3,
}


def losses_of(steps: int, seed: int, compile: bool = False) -> torch.Tensor:
    """[steps, 4]: the losses of a run's first steps."""
    config = override(runs.TINY, SMALLER | {"steps": 50, "seed": seed, "compile": compile})
    state, words = runstate.begin(config, None, None, runs.CPU)
    data = TrainSteps(runs.clips(), words, state.config)
    found = []
    for state.step in range(steps):
        metrics = training.train_step(state, data[state.step].batches)
        found.append([float(metrics[name]) for name in training.LOSSES])
    return torch.tensor(found, dtype=torch.float64)


def follows(steps: int, seed: int, compile: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        want = losses_of(steps, seed)
        choose, ran = ops._choose, set()

        def fused(op, impl, *rest):
            if impl is None and op in ("attention", "map_pool"):  # not mel_patches: that is data
                impl = "triton"
            chosen = choose(op, impl, *rest)
            ran.add((op, chosen))
            return chosen

        patch.setattr(ops, "_choose", fused)
        found = losses_of(steps, seed, compile)
    assert {("map_pool", "triton"), ("attention", "triton")} <= ran
    # A pack of clips that are all each other's positives has a contrastive loss of 0.
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0.0)


def test_the_fused_step_follows_the_reference() -> None:
    follows(2, seed=0)


@pytest.mark.slow
def test_fifty_fused_and_compiled_steps_follow_the_reference(figure) -> None:
    """D6: over other packs than those that were compiled, most of them."""
    torch._dynamo.reset()
    for seed in figure("D6", ci=1, soak=10):
        follows(50, seed, compile=True)
