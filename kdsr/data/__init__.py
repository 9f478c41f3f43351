"""Data sets and samplers, and checks of image files."""
