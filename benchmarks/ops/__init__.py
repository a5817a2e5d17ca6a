"""The operations beside their peers."""
