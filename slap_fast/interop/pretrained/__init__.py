"""Other people's models of audio and text, through the same door as ours."""
