"""The `hyperion` command, one file a command. Nothing here imports torch before a command needs it."""
