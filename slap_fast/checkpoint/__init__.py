"""Model and run folders: JSON and safetensors, written whole and read with checksums."""
