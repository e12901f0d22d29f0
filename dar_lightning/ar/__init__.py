"""Autoregressive model over token sequences. Plain torch; knows nothing of images or of the tokenizer."""
