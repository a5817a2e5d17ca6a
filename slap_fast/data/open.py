"""Which source reads a path."""

from __future__ import annotations

from pathlib import Path

from slap_fast.data.audio.decode import IN_PROCESS, Decoder
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.manifest import ManifestError, read_manifest
from slap_fast.data.shards.index import INDEX, read_index
from slap_fast.data.source import ClipSource
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.data.sources.files import ManifestClips
from slap_fast.data.sources.mixture import MixedClips, read_mix
from slap_fast.data.sources.shards import ShardClips

BUILTIN_SIZES = {"train": 5_000, "validation": 200, "test": 500}
"""Clips of each split of the built-in sounds."""
SYNONYMS = {"validation": ("validation", "valid", "val", "dev")}
"""Names that a split may have in someone's data."""


def open_source(
    data: str | Path,
    split: str | None,
    *,
    fallback: str,
    sample_rate: int = 16_000,
    min_seconds: float = 0.025,
    decoder: Decoder = IN_PROCESS,
    bad: list[ManifestError] | None = None,
) -> ClipSource:
    """Opens the built-in sounds, a manifest, a folder of files, shards, or a mix of them.

    Args:
        data: ``"builtin"``, or the path of a JSONL or CSV manifest, of a folder of files or of
            shards, or of a YAML file that :mod:`slap_fast.data.sources.mixture` describes.
        split: clips of this split; None takes ``fallback`` where the data has it, else every clip.
        fallback: "train", "validation" or "test".
        sample_rate: Hz, of the waveforms: ``model.mel.sample_rate`` of the run.
        min_seconds: shorter clips are bad, E_TOO_SHORT: ``data.min_seconds`` of the run.
        bad: takes the rows of a manifest that cannot be used, of which one at least can; without
            it the first raises.
        decoder: of the files; :class:`slap_fast.data.audio.isolated.IsolatedDecoder` is another.

    Raises:
        ManifestError: the manifest cannot be used; names file and line.
        ShardError: the index of the shards is damaged.
        ValueError: the mix, or the split of the built-in sounds, is wrong.
    """
    path = Path(data)
    if str(data) == "builtin":
        name = split or fallback
        return BuiltinClips(SoundSet(name, BUILTIN_SIZES.get(name, 0)), sample_rate)
    names = SYNONYMS.get(fallback, (fallback,))
    if path.suffix in (".yaml", ".yml"):
        parts = read_mix(path)
        options = {"sample_rate": sample_rate, "min_seconds": min_seconds, "decoder": decoder}
        options["bad"] = bad
        sources = [open_source(part.data, split, fallback=fallback, **options) for part in parts]
        return MixedClips(sources, [part.weight for part in parts])
    if (path / INDEX).exists():
        index = read_index(path)
        splits = [name for name in index.splits if name]
        chosen = split or next((name for name in names if name in splits), None)
        return ShardClips(
            path, chosen if splits else None, sample_rate, decoder, index, min_seconds
        )
    rows = read_manifest(path, split, bad=bad)
    if not rows and bad:
        raise bad[0]
    if split is None:
        rows = [row for row in rows if row.split in names] or rows
    return ManifestClips(rows, sample_rate, decoder, min_seconds)
