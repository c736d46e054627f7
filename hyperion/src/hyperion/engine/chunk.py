"""How many tokens' logits exist at one time. Imports nothing: planning forecasts memory by it."""


def logits_chunk(device: str) -> int:
    """Supervised tokens in a chunk. On a CPU its logits are to stay near the cache; a GPU is to be kept busy."""
    return 128 if device == "cpu" else 1024
