"""Latents to codes and back, one quantizer a file."""
