"""Where a tuned model goes."""
