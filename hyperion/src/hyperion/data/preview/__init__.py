"""What a run will read, made visible before it: `hyperion data preview`."""
