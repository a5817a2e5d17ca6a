"""The audio tower as one file for other runtimes: a waveform of any length in, its embedding out.

``.pt2`` is a torch.export program, ``.onnx`` runs in onnxruntime. One clip needs no packing, so
everything is dense: the front end is a convolution, attention has a mask, the pooling a softmax.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slap_fast.config import MelConfig
from slap_fast.data.patches import clip_patches
from slap_fast.models.layers import Attention, Segments
from slap_fast.models.slap import SlapModel
from slap_fast.packed import PackedPatches, column_and_band
from slap_fast.reference import mel_patches as reference_mel
from slap_fast.reference.rope import rotate

TOLERANCE = 1e-4
"""Largest difference of a unit-norm embedding's elements from the model's own."""
COMPARED_SECONDS = (0.05, 1.0, 7.3)
"""Lengths of the clips that a file is compared on before it is written."""


class FrontEnd(nn.Module):
    """[num_samples] float32 -> patches [T, patch_dim]: :func:`slap_fast.ops.mel_patches` of a clip.

    Centring, pre-emphasis, window and Fourier transform are linear in a frame's samples, so they
    are one convolution.
    """

    def __init__(self, mel: MelConfig) -> None:
        super().__init__()
        self.mel = mel
        spectra = reference_mel.spectrum(torch.eye(mel.win_length, dtype=torch.float64), mel)
        kernel = torch.cat([spectra.real, spectra.imag], dim=1).T[:, None]
        filterbank = reference_mel.constants(mel, torch.float32, torch.device("cpu"))[1]
        self.register_buffer("kernel", kernel.float().contiguous())
        self.register_buffer("filterbank", filterbank.T.contiguous())
        cells = torch.eye(mel.patch_dim).view(-1, 1, mel.patch_time, mel.patch_freq)
        self.register_buffer("cells", cells)

    def forward(self, waveform: Tensor) -> Tensor:
        mel, num_frames = self.mel, None
        samples = waveform[None, None]
        if mel.preset == "torchaudio":
            num_frames = waveform.shape[0] // mel.hop_length + 1
            samples = F.pad(samples, (mel.n_fft // 2, mel.n_fft // 2), mode="reflect")
            samples = samples[..., (mel.n_fft - mel.win_length) // 2 :]
        spectra = F.conv1d(samples, self.kernel, stride=mel.hop_length)[0, :, :num_frames]
        real, imag = spectra.chunk(2)
        bands = (self.filterbank @ (real.square() + imag.square())).clamp(min=mel.floor).log().T
        # Silence fills the last column, and a patch is the window of a convolution.
        bands = F.pad(bands, (0, 0, 0, mel.patch_time - 1), value=mel.log_floor)
        bands = (bands - mel.mean) / mel.std
        patches = F.conv2d(bands[None, None], self.cells, stride=self.cells.shape[2:])
        return patches[0].flatten(1).T


def dense_attention(
    packed: Attention, x: Tensor, rope: tuple[Tensor, Tensor], _: Segments
) -> Tensor:
    """The forward of an :class:`Attention` for a run of one sequence: x [T, C] -> [T, C]."""
    q, k, v = packed.qkv_proj(x).unflatten(-1, (3, packed.num_heads, -1)).unbind(1)
    q, k, v = (y.transpose(0, 1)[None] for y in (rotate(q, rope), rotate(k, rope), v))
    mask, (left, right) = None, packed.window_size
    if left != -1:
        token = torch.arange(x.shape[0], device=x.device)
        distance = token - token[:, None]
        mask = (distance >= -left) & (distance <= right)
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return packed.out_proj(out[0].transpose(0, 1).flatten(1))


def dense_pooling(packed: Any, probe: Tensor, x: Tensor, _: Tensor | None) -> Tensor:
    """The pooling of a :class:`MAPHead` for a run of one sequence: x [T, C] -> [1, C]."""
    weights = packed.in_proj_weight.chunk(3)
    qkv = (F.linear(y, w) for y, w in zip((probe[0], x, x), weights, strict=True))
    q, k, v = (y.unflatten(-1, (packed.num_heads, -1)).transpose(0, 1)[None] for y in qkv)
    out = F.scaled_dot_product_attention(q, k, v)
    return packed.out_proj(out[0].transpose(0, 1).flatten(1))


class ClipEmbedder(nn.Module):
    """[num_samples] float32 at the model's rate -> [E], unit norm."""

    def __init__(self, model: SlapModel) -> None:
        super().__init__()
        self.front_end = FrontEnd(model.config.mel)
        self.encoder = copy.deepcopy(model.audio_encoder)
        self.head = copy.deepcopy(model.audio_head)
        self.projection = copy.deepcopy(model.audio_projection)
        for layer in self.encoder.layers:
            layer.attention.forward = functools.partial(dense_attention, layer.attention)
        self.head.attention.forward = functools.partial(dense_pooling, self.head.attention)
        self.eval().requires_grad_(False)

    def forward(self, waveform: Tensor) -> Tensor:
        patches = self.front_end(waveform)
        token = torch.arange(patches.shape[0], device=patches.device)
        coords = column_and_band(token, self.front_end.mel.patches_per_column)
        starts = torch.zeros(2, dtype=torch.int32)  # cu_seqlens, which nothing dense reads
        features = self.encoder(PackedPatches(patches, coords, starts, 0))
        return F.normalize(self.projection(self.head(features, None)), dim=-1)[0]


def export(model: SlapModel, out: Path) -> float:
    """Writes the audio tower to ``out`` if it gives the model's own embeddings.

    Args:
        model: on the CPU.
        out: ``*.onnx``, input "waveform", output "embedding", or ``*.pt2``.

    Returns:
        The largest difference from the model on clips of :data:`COMPARED_SECONDS`.

    Raises:
        ValueError: another suffix, or packages are missing.
        RuntimeError: the difference is more than :data:`TOLERANCE`.
    """
    writers = {".onnx": _as_onnx, ".pt2": _as_program}
    if out.suffix not in writers:
        raise ValueError(f"out: found {str(out)!r}, expected a name that ends in .onnx or .pt2")
    content, embed = writers[out.suffix](model)
    difference = max(_difference(model, embed, seconds) for seconds in COMPARED_SECONDS)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{out}: not written: {difference:.1e} away from the model, expected {TOLERANCE:g}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)
    return difference


def trace(model: SlapModel) -> torch.export.ExportedProgram:
    """The program of a :class:`ClipEmbedder`, for any number of samples from one frame on."""
    from torch.fx.experimental import _config

    mel = model.config.mel
    shortest = mel.win_length if mel.preset == "kaldi" else mel.n_fft // 2 + 1
    shapes = {"waveform": {0: torch.export.Dim("num_samples", min=shortest)}}
    # A clip of one frame is legal too: without this, a size of 1 would be specialised.
    with _config.patch(backed_size_oblivious=True):
        waveform = torch.zeros(mel.sample_rate)
        return torch.export.export(ClipEmbedder(model), (waveform,), dynamic_shapes=shapes)


Embed = Callable[[np.ndarray], Any]
"""[num_samples] float32 -> [E]."""


def _as_program(model: SlapModel) -> tuple[bytes, Embed]:
    file = io.BytesIO()
    torch.export.save(trace(model), file)
    file.seek(0)
    module = torch.export.load(file).module()
    return file.getvalue(), lambda waveform: module(torch.from_numpy(waveform))


def _as_onnx(model: SlapModel) -> tuple[bytes, Embed]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except Exception as error:
        raise ValueError(
            f"out: .onnx needs onnxscript and onnxruntime ({error}); "
            "pip install 'slap-fast[export]', or choose a name that ends in .pt2"
        ) from None
    # It logs the torchvision operations that are not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    program = torch.onnx.export(
        trace(model),
        input_names=["waveform"],
        output_names=["embedding"],
        dynamic_shapes={"waveform": {0: "num_samples"}},
        verbose=False,
    )
    program.model.metadata_props["sample_rate"] = str(model.config.mel.sample_rate)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda waveform: session.run(None, {"waveform": waveform})[0]


@torch.no_grad()
def _difference(model: SlapModel, embed: Embed, seconds: float) -> float:
    mel = model.config.mel
    rng = np.random.default_rng(0)
    waveform = rng.standard_normal(round(seconds * mel.sample_rate)).astype(np.float32) / 10
    expected = model.embed_audio(clip_patches(waveform, mel))[0].numpy()
    return float(np.abs(np.asarray(embed(waveform)) - expected).max())
