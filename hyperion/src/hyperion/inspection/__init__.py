"""What is in a model folder, a GGUF file or an artifact, from headers and json alone: no weight is read, no torch."""
