"""Settings that depend on another follow it unless they are set too, and that is said."""

from __future__ import annotations

import pytest

from slap_fast.config import MelConfig, derived, from_dict, override, slap_base, slap_tiny

RATE = "model.mel.sample_rate"


@pytest.mark.parametrize("rate", [8_000, 22_050, 32_000, 44_100, 48_000])
def test_the_mel_keeps_its_seconds_and_its_share_of_the_band(rate):
    mel = override(slap_base(), {RATE: rate}).model.mel
    assert mel.win_length / rate == pytest.approx(0.025, abs=1e-4)
    assert mel.hop_length / rate == pytest.approx(0.010, abs=1e-4)
    assert mel.f_max == rate / 2 and mel.f_min == 20
    assert mel.win_length <= mel.n_fft and mel.n_fft & (mel.n_fft - 1) == 0


def test_what_is_set_stays_and_the_rest_is_named():
    changes = {RATE: 32_000, "model.mel.f_max": 14_000.0, "steps": 3}
    config = override(slap_tiny(), changes)
    assert config.model.mel.f_max == 14_000
    followed = derived(slap_tiny(), changes, config)
    assert followed == {
        "model.mel.n_fft": 1024,
        "model.mel.win_length": 800,
        "model.mel.hop_length": 640,
        "warmup_steps": 3,
    }
    assert derived(slap_tiny(), {"steps": 50}, override(slap_tiny(), {"steps": 50})) == {}


def test_a_stored_config_is_read_as_it_is():
    odd = {"sample_rate": 32_000, "win_length": 400, "n_fft": 512, "hop_length": 160}
    stored = {**odd, "f_max": 8_000.0}
    mel = from_dict(MelConfig, stored)
    assert (mel.sample_rate, mel.win_length, mel.n_fft) == (32_000, 400, 512)
    nested = override(slap_tiny(), {"model": {"mel": stored}}).model.mel
    assert (nested.win_length, nested.n_fft, nested.f_max) == (400, 512, 8_000)


def test_nested_and_dotted_changes_are_one():
    nested = {"model": {"audio": {"num_layers": 5}}, "model.ssl": {"mask_ratio": 0.3}}
    dotted = {"model.audio.num_layers": 5, "model.ssl.mask_ratio": 0.3}
    assert override(slap_tiny(), nested) == override(slap_tiny(), dotted)
    assert override(slap_tiny(), nested).model.audio.hidden_size == 128


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("ssl.mask_ratio", "did you mean model.ssl.mask_ratio?"),
        ("mask_ratio", "did you mean model.ssl.mask_ratio?"),
        ("model.mask_ratio", "did you mean model.ssl.mask_ratio?"),
        ("model.audio.num_layer", "did you mean model.audio.num_layers?"),
        ("max_seconds", "did you mean data.max_seconds?"),
        ("num_heads", "model.audio.num_heads or model.text.num_heads or model.caption.num_heads?"),
        ("lr.x", "lr: has no settings of its own"),
        ("qqqq", "known here: model, loss, data, steps"),
    ],
)
def test_an_unknown_setting_names_the_one_that_was_meant(key, hint):
    with pytest.raises(ValueError) as error:
        override(slap_tiny(), {key: 1})
    assert hint in str(error.value)
