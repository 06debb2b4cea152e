"""What lies on disk: files that appear whole or not at all, checkpoints, snapshots."""
