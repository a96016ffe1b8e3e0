"""Command-line arguments, and output to the terminal."""
