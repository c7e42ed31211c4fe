"""``python -m raylora.rank``: see ``raylora.commands.rank``."""

from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command("rank")
