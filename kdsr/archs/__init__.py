"""Networks that BasicSR lacks; each ``*_arch.py`` registers itself in ARCH_REGISTRY."""
