"""Networks that BasicSR lacks; each ``*_arch.py`` registers its classes in ARCH_REGISTRY."""
