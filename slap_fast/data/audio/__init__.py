"""What an audio file is, and how it becomes samples."""
