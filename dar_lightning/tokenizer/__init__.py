"""Image <-> ordered tokens. Plain torch."""
