"""slap-fast inside other people's code: their models patched, their classes, their benchmarks.

Nothing happens on import; each module imports the package it is named for when it is used.
"""
