"""How many tokens' logits exist at one time. Imports nothing: planning forecasts memory by it."""

LOGITS_CHUNK = 1024  # supervised tokens
