"""A trained model as a user holds it."""
