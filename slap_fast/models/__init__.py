"""The SLAP model: layers, the two towers, the caption decoder, and their sum in ``slap``."""
