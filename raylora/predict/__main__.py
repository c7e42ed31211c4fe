"""``python -m raylora.predict``: see ``raylora.commands.predict``."""

from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command("predict")
