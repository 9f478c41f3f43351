"""Losses: functions on tensors, and a thin module for each in LOSS_REGISTRY."""
