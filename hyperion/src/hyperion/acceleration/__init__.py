"""What makes a training step fast and small, without changing what it computes."""
