"""What others must know of a tuned model."""
