"""Processes, signals, the mesh of devices, and the settings of a process."""
