"""The SLAP model and its parts. Each part works alone, in any loop: no global state, no trainer.

Layers over a packed run (T tokens, ``cu_seqlens`` int32 [B + 1]): ``Attention``, ``MAPHead``,
``RMSNorm``, ``SwiGLU``. Towers: ``AudioTower`` from waveforms, ``AudioEncoder`` from patches,
``TextEncoder`` from token ids. The complete model: ``SlapModel`` and its EMA ``Teacher``.
"""

from slap_fast.models.audio_encoder import AudioEncoder
from slap_fast.models.audio_tower import AudioTower
from slap_fast.models.caption_decoder import CaptionDecoder
from slap_fast.models.layers import Attention, MAPHead, RMSNorm, Segments, SwiGLU
from slap_fast.models.slap import PrototypeHead, SlapModel, Teacher
from slap_fast.models.text_encoder import TextEncoder

__all__ = [
    "Attention",
    "AudioEncoder",
    "AudioTower",
    "CaptionDecoder",
    "MAPHead",
    "PrototypeHead",
    "RMSNorm",
    "Segments",
    "SlapModel",
    "SwiGLU",
    "Teacher",
    "TextEncoder",
]
