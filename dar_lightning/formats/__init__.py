"""Weights as files: our folders (config.json, model.safetensors, Hub), and others' checkpoints read as data."""
