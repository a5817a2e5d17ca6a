"""Tar shards: their index, writing them, and taking in those of other tools."""
