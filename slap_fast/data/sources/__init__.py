"""Where clips come from: each file here is a ClipSource."""
