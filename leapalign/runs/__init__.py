"""A training run on disk: its folder, records, checkpoints, start, end and continuation."""
