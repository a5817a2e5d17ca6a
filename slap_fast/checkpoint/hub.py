"""Files of a hub's model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slap_fast.checkpoint.format import CheckpointError


def download(
    name: str, patterns: Sequence[str], revision: str | None, local_files_only: bool
) -> Path:
    """The folder of a hub's model, its files that match the patterns downloaded where missing.

    Raises CheckpointError: no such model can be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
        )
    except (HFValidationError, OSError) as error:
        where = "was downloaded before" if local_files_only else "can be reached"
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{name}: found no such folder, nor a hub model of that name{at} that {where} "
            f"({type(error).__name__})"
        ) from None
    return Path(folder)
