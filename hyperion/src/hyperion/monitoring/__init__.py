"""What a run shows while it lives, and the figures that it leaves: progress, metrics.jsonl, loss.png, samples.jsonl."""
