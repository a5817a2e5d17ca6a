"""Packed attention where keys are another sequence's: an encoder's, of any length and padding."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import slap_fast
from benchmarks.transformers_batches import MASK
from benchmarks.transformers_models import inputs_of, make
from slap_fast.models import hf_attention
from slap_fast.packed import starts_of


@pytest.mark.parametrize("k_lengths", [(2, 5, 2), (4, 5, 3)], ids=["as many keys", "more keys"])
def test_packed_queries_and_keys_have_lengths_of_their_own(k_lengths):
    q_lengths = (4, 2, 3)
    q, k, v = (torch.randn(1, 2, sum(n), 8) for n in (q_lengths, k_lengths, k_lengths))
    out, _ = hf_attention.packed_attention(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        is_causal=False,
        cu_seq_lens_q=starts_of(q_lengths),
        cu_seq_lens_k=starts_of(k_lengths),
        max_length_q=4,
        max_length_k=5,
    )
    parts = (q.split(q_lengths, 2), k.split(k_lengths, 2), v.split(k_lengths, 2))
    expected = torch.cat(
        [scaled_dot_product_attention(*part) for part in zip(*parts, strict=True)], 2
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("length", [5, 9])
def test_an_encoders_padding_is_of_its_keys_alone(length):
    """As many queries as keys, or fewer: a decoder's tokens at the encoder's padding are real."""
    model = make("BartModel")
    inputs = {**inputs_of("BartModel"), "decoder_input_ids": torch.arange(10, 10 + length)[None]}
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"].repeat(2, 1)
    expected = model(**inputs)
    assert slap_fast.patch(model).changed("attention") == 6
    actual = model(**inputs)
    torch.testing.assert_close(
        actual.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5
    )
    encoded = (out.encoder_last_hidden_state[MASK.bool()] for out in (actual, expected))
    torch.testing.assert_close(*encoded, rtol=1e-4, atol=1e-5)


def test_generation_of_an_encoder_decoder_is_the_same():
    from transformers import BartConfig, BartForConditionalGeneration

    from benchmarks.transformers_models import SEQ2SEQ

    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**SEQ2SEQ)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    inputs = {name: inputs_of("BartModel")[name] for name in ("input_ids", "attention_mask")}
    more = {"max_new_tokens": 8, "num_beams": 2}
    expected = model.generate(**inputs, **more)
    assert slap_fast.patch(model).changed("attention") == 6
    assert torch.equal(model.generate(**inputs, **more), expected)
