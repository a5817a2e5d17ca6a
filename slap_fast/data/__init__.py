"""From files and captions to packed batches: manifest, decode, augment, pack."""
