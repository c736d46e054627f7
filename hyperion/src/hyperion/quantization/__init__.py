"""Quantized bases: what is asked of the run's quantizer, in which order, and where its results are kept."""
