"""``python -m raylora.batch``: see ``raylora.commands.batch``."""

from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command("batch")
