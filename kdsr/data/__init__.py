"""Data sets, samplers, degradations and augmentations."""
