"""Log-mel patches beside other front ends: `python -m benchmarks.ops.mel [--json FILE]`.

Every peer makes 64 log-mel bins of 25 ms frames each 10 ms, save transformers' extractors, which
make what their models take; a peer with one of our definitions is compared with ours before it is
timed. On a CPU with one thread and with two, on a GPU with the kernel's share of the memory floor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import cases, harness
from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.packed import starts_of
from slap_fast.reference import mel_patches as reference

RATE = 16_000
SAMPLES_PER_TOKEN = RATE // cases.TOKENS_PER_SECOND
PRESETS = {name: MelConfig(preset=name, mean=0.0, std=1.0) for name in ("kaldi", "torchaudio")}
IMPLS = {"cuda": ("triton",), "cpu": ("cpp", "torch")}
"""PyTorch's takes a second a call on a GPU: 128 frames at a time."""
TOLERANCE = 0.05
"""Of ln(mel), the largest difference between two fp32 pipelines on noise."""

Peer = Callable[[list[Tensor]], list[Any]]
"""Clips [num_samples] -> their log-mel [frames, 64], or what a model takes."""


def stft(clips: list[Tensor]) -> list[Tensor]:
    """The torchaudio preset from torch.stft; one batch where all clips are as long."""
    window, filterbank = reference.constants(PRESETS["torchaudio"], torch.float32, clips[0].device)
    equal = len({len(clip) for clip in clips}) == 1
    log_mels: list[Tensor] = []
    for batch in [torch.stack(clips)] if equal else [clip[None] for clip in clips]:
        spectrum = torch.stft(batch, 512, 160, 400, window, return_complex=True)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        log_mels += (power.transpose(1, 2) @ filterbank).clamp_min_(1e-10).log_()
    return log_mels


def torchaudio_mel() -> Peer:
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(
        RATE, 512, 400, 160, f_min=20.0, f_max=8000.0, n_mels=64
    )
    return lambda clips: [mel(clip).clamp_min(1e-10).log().T for clip in clips]


def torchaudio_fbank() -> Peer:
    from torchaudio.compliance import kaldi

    def fbank(clip: Tensor) -> Tensor:
        return kaldi.fbank(
            clip[None], num_mel_bins=64, window_type="hanning", sample_frequency=RATE, dither=0.0
        )

    return lambda clips: [fbank(clip) for clip in clips]


def librosa_mel() -> Peer:
    import librosa

    options = {"sr": RATE, "n_fft": 512, "hop_length": 160, "win_length": 400, "n_mels": 64}
    options |= {"fmin": 20.0, "fmax": 8000.0, "htk": True, "norm": None, "pad_mode": "reflect"}

    def mel(clip: Tensor) -> np.ndarray:
        return np.log(
            np.maximum(librosa.feature.melspectrogram(y=clip.numpy(), **options), 1e-10)
        ).T

    return lambda clips: [mel(clip) for clip in clips]


def kaldi_native_fbank() -> Peer:
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.frame_opts.samp_freq = RATE
    options.mel_opts.num_bins = 64
    options.mel_opts.high_freq = 8000.0

    def fbank(clip: Tensor) -> np.ndarray:
        online = kaldi_native_fbank.OnlineFbank(options)
        online.accept_waveform(RATE, clip.numpy())
        return np.array([online.get_frame(i) for i in range(online.num_frames_ready)])

    return lambda clips: [fbank(clip) for clip in clips]


def extractor(name: str) -> Callable[[], Peer]:
    """An extractor with its defaults: Whisper's pads to 30 s, CLAP's takes samples for 48 kHz."""

    def make() -> Peer:
        import transformers

        extract = getattr(transformers, name)()
        key, rate = extract.model_input_names[0], extract.sampling_rate

        def features(clip: Tensor) -> np.ndarray:
            return extract(clip.numpy(), sampling_rate=rate, return_tensors="np")[key][0]

        return lambda clips: [features(clip) for clip in clips]

    return make


PEERS: dict[str, tuple[Callable[[], Peer], str | None]] = {
    "torchaudio MelSpectrogram": (torchaudio_mel, "torchaudio"),
    "torchaudio kaldi.fbank": (torchaudio_fbank, "kaldi"),
    "librosa": (librosa_mel, "torchaudio"),
    "kaldi-native-fbank": (kaldi_native_fbank, "kaldi"),
    "transformers Whisper": (extractor("WhisperFeatureExtractor"), None),
    "transformers AST": (extractor("ASTFeatureExtractor"), None),
    "transformers CLAP": (extractor("ClapFeatureExtractor"), None),
}
"""What makes the peer, and the preset whose definition it has."""


def load(make: Callable[[], Peer], clip: Tensor, preset: str | None) -> Peer:
    """The peer, once it agrees with ours on a clip; raises NotInstalled."""
    try:
        peer = make()
        log_mel = torch.as_tensor(np.asarray(peer([clip])[0]))
    except Exception as error:  # torchaudio beside another torch raises OSError, for one
        raise harness.NotInstalled(f"{type(error).__name__}: {error}") from error
    if preset is not None:
        assert_accurate(log_mel, clip, preset)
    return peer


def assert_accurate(log_mel: Tensor, clip: Tensor, preset: str) -> None:
    """Raises RuntimeError where a log-mel [frames, 64] is not the preset's."""
    config = PRESETS[preset]
    patches = reference.mel_patches(clip.double(), torch.tensor([0, len(clip)]), config)[0]
    grid = patches.view(-1, 4, 16, 16).transpose(1, 2).reshape(-1, 64)
    error = (log_mel.cpu().double() - grid[: len(log_mel)]).abs().max().item()
    if len(log_mel) != config.num_frames(len(clip)) or not error < TOLERANCE:
        raise RuntimeError(f"{preset}: {len(log_mel)} frames differ by {error:.2g}")


def ours(inputs: list[Tensor], bounds: Tensor, config: MelConfig, impl: str) -> harness.Variant:
    """An implementation of ours on the three inputs in turn."""
    return lambda number: ops.mel_patches(inputs[number % 3], bounds, config, impl=impl)


def variants_of(case: cases.Case, rows: list[dict[str, Any]]) -> dict[str, harness.Variant]:
    """What runs the case; peers that do not load become rows with a note."""
    device = harness.device()
    bounds = starts_of(case.lengths, torch.int64).to(device) * SAMPLES_PER_TOKEN
    waves = [0.1 * torch.randn(int(bounds[-1]), device=device) for _ in range(3)]
    int16_waves = [(wave * 2**15).clamp(-(2**15), 2**15 - 1).to(torch.int16) for wave in waves]
    sizes = (bounds.diff()).tolist()
    clips = [wave.split(sizes) for wave in waves]
    variants = {
        f"slap-fast {impl}, {preset}, {kind}": ours(inputs, bounds, config, impl)
        for impl in IMPLS[device.type]
        for preset, config in PRESETS.items()
        for kind, inputs in (("fp32", waves), ("int16", int16_waves))
    }
    for preset, config in PRESETS.items():
        first = clips[0][0]
        one = ops.mel_patches(first, torch.tensor([0, len(first)], device=device), config)
        grid = one.patches.view(-1, 4, 16, 16).transpose(1, 2).reshape(-1, 64)
        assert_accurate(grid[: config.num_frames(len(first))], first.cpu(), preset)
    assert_accurate(stft([clips[0][0]])[0], clips[0][0].cpu(), "torchaudio")
    variants["torch.stft pipeline"] = lambda number: stft(clips[number % 3])
    if case.name != "C1" or device.type == "cuda":
        return variants
    for name, (make, preset) in PEERS.items():
        try:
            peer = load(make, clips[0][0], preset)
        except harness.NotInstalled as error:
            rows.append({"case": case.name, "variant": name, "note": f"not installed: {error}"})
        else:
            variants[name] = lambda number, peer=peer: peer(clips[number % 3])
    return variants


def rows_of(case: cases.Case, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each variant and number of threads."""
    device, missing = harness.device(), []
    variants = variants_of(case, missing)
    seconds_of_audio = sum(case.lengths) / cases.TOKENS_PER_SECOND
    threads = torch.get_num_threads()
    for count in (1,) if device.type == "cuda" else (1, 2):
        torch.set_num_threads(count)
        taken = harness.measure(variants, device, rounds=rounds)
        base = taken["torch.stft pipeline"]["ms"]
        for name, figures in taken.items():
            row = {"case": case.name, "variant": name, "threads": count, **figures}
            row["audio_s_per_s"] = 1e3 * seconds_of_audio / figures["ms"]
            row["times_stft"] = base / figures["ms"]
            if "triton" in name:
                moved = seconds_of_audio * (RATE * (2 if "int16" in name else 4) + 100 * 64 * 4)
                row |= harness.bandwidth(moved, figures["ms"])
            yield row
    torch.set_num_threads(threads)
    yield from missing


def main() -> int:
    """Runs the cases and prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    scale = options.scale or (1.0 if harness.device().type == "cuda" else 0.01)
    packs = cases.packs(scale)
    parts = {case.name: partial(rows_of, case, options.rounds) for case in packs}
    harness.finish(parts, f"log-mel patches, scale {scale:g}", options, packs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
