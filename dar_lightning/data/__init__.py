"""Data: shards, decoding and crops, token shards, and the DataModules that all LightningModules share."""
