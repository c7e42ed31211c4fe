"""``python -m raylora.experiment``: see ``raylora.commands.experiment``."""

from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command("experiment")
