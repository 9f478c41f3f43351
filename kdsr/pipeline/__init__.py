"""What surrounds the training loop: options, the seam into BasicSR, progress."""
