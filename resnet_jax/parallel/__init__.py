"""Processes, signals, the mesh of devices, and the settings of a process.

`processes.py` connects the processes of a run, `signals.py` handles SIGTERM and Ctrl-C,
`sharding.py` places arrays on devices, `accelerators.py` gives advice on devices that
JAX does not use, and `process_memory.py` sets up malloc and garbage collection.
"""
