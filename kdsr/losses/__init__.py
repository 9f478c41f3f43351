"""Losses: pure functions on tensors, each with a thin module in LOSS_REGISTRY."""
