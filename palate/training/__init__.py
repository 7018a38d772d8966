"""The one training loop: what it asks of data and policy, steps that measure a batch, updates, checkpoints, the log."""
