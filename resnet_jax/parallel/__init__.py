"""Processes, signals, meshes and the memory of a process."""
