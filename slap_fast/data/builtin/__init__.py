"""The built-in sounds: captioned scenes and their synthesis."""
