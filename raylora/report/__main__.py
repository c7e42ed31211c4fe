"""``python -m raylora.report``: see ``raylora.commands.report``."""

from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command("report")
