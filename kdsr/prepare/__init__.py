"""Preparation of data sets: bicubic pairs, sub-images, synthetic degradations, the sample."""
