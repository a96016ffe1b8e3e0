"""Command-line arguments, and output to the terminal.

`arguments.py` parses command lines, `output.py` prints without ending a run where that
fails, and `quiet.py` silences libraries.
"""
