"""Around BasicSR's training loop: replacements in BasicSR, preflight, resume, progress."""
