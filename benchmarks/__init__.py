"""What is measured, and the tables and pictures made of it."""
