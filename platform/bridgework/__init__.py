"""bridgework: vision-language systems from raw image-text pairs to a served endpoint, on Ray."""

__version__ = "0.1.0"
