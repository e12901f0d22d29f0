"""Pixels, labels and cached tokens in: shards, crops and the DataModules that every LightningModule shares."""
