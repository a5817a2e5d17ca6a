"""Sounds and spectrograms, as the demo's report embeds them."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import soundfile

from slap_fast.demo.content import ReportClip

# Nine equally spaced points of the magma colour map (https://bids.github.io/colormap).
_MAGMA = "000004 1c1044 4f127b 812581 b5367a e55064 fb8761 fec287 fcfdbf".split()
MAX_COLUMNS = 640
"""Widest spectrogram, pixels: enough for its place on the page."""


def embedded_clips(clips: list[ReportClip]) -> str:
    """Audio and spectrograms as base64 in inert script elements, by the number of the clip."""
    points = np.array([list(bytes.fromhex(colour)) for colour in _MAGMA])
    positions, levels = np.linspace(0, 1, len(points)), np.linspace(0, 1, 256)
    palette = np.stack([np.interp(levels, positions, channel) for channel in points.T], 1)
    blocks = [_block("palette", np.rint(palette).astype(np.uint8).tobytes())]
    for i, clip in enumerate(clips):
        picture = _spectrogram(clip.log_mel)
        blocks.append(_block(f"wav-{i}", _wav(clip.waveform, clip.sample_rate)))
        size = f' data-height="{picture.shape[0]}" data-width="{picture.shape[1]}"'
        blocks.append(_block(f"mel-{i}", picture.tobytes(), size))
    return "".join(blocks)


def _block(name: str, content: bytes, attributes: str = "") -> str:
    text = base64.b64encode(content).decode("ascii")
    return f'<script type="text/plain" id="{name}"{attributes}>{text}</script>\n'


def _wav(waveform: np.ndarray, sample_rate: int) -> bytes:
    """A mono 16-bit WAV file; what lies beyond full scale is clipped."""
    file = io.BytesIO()
    samples = np.rint(np.clip(waveform, -1, 1) * 32767).astype(np.int16)
    soundfile.write(file, samples, sample_rate, format="WAV")
    return file.getvalue()


def _spectrogram(log_mel: np.ndarray) -> np.ndarray:
    """uint8 [n_mels, columns], highest bin first; the quietest tenth of the picture is black.

    A column is the loudest of its frames, which keeps clicks visible in long clips.
    """
    frames = len(log_mel)
    log_mel = np.maximum.reduceat(log_mel, range(0, frames, math.ceil(frames / MAX_COLUMNS)))
    low, high = np.percentile(log_mel, (10, 99.9))
    scaled = np.clip((log_mel - low) / max(high - low, 1e-6), 0, 1)
    return np.ascontiguousarray(np.rint(255 * scaled).astype(np.uint8).T[::-1])
