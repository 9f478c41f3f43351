"""Errors, checkpoints, devices, processes, precision."""
