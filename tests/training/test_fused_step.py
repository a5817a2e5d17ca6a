"""D6: a training step on the Triton kernels has the losses of the reference step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from slap_fast import losses
from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.losses import self_distillation
from slap_fast.ops import dispatch
from slap_fast.packed import IGNORE_INDEX
from slap_fast.training.state import begin
from slap_fast.training.step import LOSSES, train_step
from tests.helpers import runs

SMALLER = {  # half the programs, or less, to interpret
    "model.audio.num_heads": 1,
    "model.text.num_heads": 1,
    "model.caption.num_heads": 1,
    "batch_size": 3,
}


def losses_of(steps: int, seed: int, compile: bool = False) -> torch.Tensor:
    """[steps, 4]: the losses of a run's first steps."""
    config = override(runs.TINY, SMALLER | {"steps": 50, "seed": seed, "compile": compile})
    state, tokenizer = begin(config, None, None, runs.CPU)
    data = TrainSteps(runs.clips(), tokenizer, state.config)
    losses_of_steps = []
    for state.step in range(steps):
        metrics = train_step(state, data[state.step].batches)
        losses_of_steps.append([float(metrics[name]) for name in LOSSES])
    return torch.tensor(losses_of_steps, dtype=torch.float64)


def textbook(patch: pytest.MonkeyPatch) -> None:
    """Losses as a paper writes them, all logits at once, instead of the trainer's."""

    def contrastive(audio, text, logit_scale, *, groups):
        logits = logit_scale * audio @ text.T
        right = (groups[:, :, None] == groups[:, 0]).any(1).float()
        both = ((logits, right), (logits.T, right.T))
        means = [(log_q.log_softmax(1) * p).sum(1) / p.sum(1) for log_q, p in both]
        return -sum(means).mean() / 2

    @torch.no_grad()
    def sinkhorn(features, prototypes, temperature, iterations):
        log_p = features @ prototypes.T / temperature
        for _ in range(iterations):
            log_p = (log_p - log_p.logsumexp(0)).log_softmax(1)
        return log_p.exp()

    def ssl(features, prototypes, targets, temperature):
        log_q = (features @ prototypes.T / temperature).log_softmax(1)
        return -(targets * log_q).sum() / max(1, len(targets)), {}

    def caption(hidden, weight, labels, impl):
        return F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX)

    patch.setattr(losses, "contrastive_loss", contrastive)
    patch.setattr(losses, "caption_loss", caption)
    patch.setattr(self_distillation, "sinkhorn", sinkhorn)
    patch.setattr(self_distillation, "self_distillation_loss", ssl)


def follows(steps: int, seed: int, compile: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        textbook(patch)
        expected = losses_of(steps, seed)
    fused = dispatch.using({"attention": "triton", "map_pool": "triton"})
    with fused, pytest.MonkeyPatch.context() as patch:
        choose, ran = dispatch.choose, set()

        def recorded(op, *arguments):
            impl = choose(op, *arguments)
            ran.add((op, impl))
            return impl

        patch.setattr(dispatch, "choose", recorded)
        torch._dynamo.reset()
        counters.clear()
        actual = losses_of(steps, seed, compile)
    assert {("map_pool", "triton"), ("attention", "triton")} <= ran
    if (
        compile
    ):  # student, teacher, targets and three losses, each for the first sizes and for other sizes
        assert not counters["graph_break"]
        assert 6 <= counters["stats"]["unique_graphs"] <= 18
    # A pack of clips that are all each other's positives has a contrastive loss of 0.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0)


def test_the_fused_step_follows_the_reference() -> None:
    follows(2, seed=0)


@pytest.mark.slow(minutes=3)
def test_many_fused_and_compiled_steps_follow_the_reference(figure) -> None:
    """D6: over other packs than those that were compiled, most of them."""
    torch._dynamo.reset()
    for seed in figure("D6", ci=1, soak=10):
        follows(50 if figure.soak else 20, seed, compile=True)
