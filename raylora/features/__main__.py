"""``python -m raylora.features``: see ``raylora.commands.features``."""

from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command("features")
