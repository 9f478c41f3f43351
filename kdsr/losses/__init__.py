"""Losses: functions on tensors, and a thin module for each in LOSS_REGISTRY.

The modules raise an ``OptionError`` for an invalid value.
"""
