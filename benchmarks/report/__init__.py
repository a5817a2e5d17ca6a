"""Tables, pictures and checks of what was recorded."""
