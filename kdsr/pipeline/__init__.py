"""What surrounds BasicSR's training loop: the seam into BasicSR, preflight, resume, progress."""
