"""``slap-fast demo`` and its report."""
