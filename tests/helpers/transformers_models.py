"""The small transformers models that show what a patch gets wrong, of the many in benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.transformers_models import inputs_of

MODELS = (
    "BertModel",
    "BertLMHeadModel",
    "BartModel",
    "MarianModel",
    "T5Model",
    "T5EncoderModel",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "MistralForCausalLM",
    "Mamba2Model",
    "HieraModel",
    "SwinModel",
    "BeitModel",
    "Wav2Vec2BertModel",
)


def output_of(model: nn.Module, name: str) -> Tensor:
    """Its main output, at the positions that are no padding."""
    inputs = inputs_of(name)
    with torch.no_grad():
        out = model(**inputs)
    value = out.logits if "logits" in out else out.last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool()]


def assert_same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    """Of (values, gradients): each gradient is compared with the norm of all."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    norm = torch.stack([x.norm() for x in expected[1]]).norm()
    for a, b in zip(actual[1], expected[1], strict=True):
        assert (a - b).norm() <= 1e-5 * norm
