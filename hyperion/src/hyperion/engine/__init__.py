"""The training engine: loss, optimizer, data order, checkpoints. Its modules import torch; this page does not."""
