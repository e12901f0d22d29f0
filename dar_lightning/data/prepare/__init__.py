"""From whatever people have to shards: folders, ILSVRC archives, Hugging Face data sets (`dar shard`)."""
