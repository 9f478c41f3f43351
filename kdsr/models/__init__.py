"""Models: what one training step does."""
