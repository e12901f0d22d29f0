"""Preparation of shards from folders, ILSVRC archives and Hugging Face data sets (`dar shard`)."""
