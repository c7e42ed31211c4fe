"""The commands: options in, work, exit codes out."""
