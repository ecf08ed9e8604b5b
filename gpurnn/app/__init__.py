"""The command line's character model: text in, checkpoints, logs and figures out."""
