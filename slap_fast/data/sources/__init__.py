"""Where clips come from: each file defines a ClipSource."""
