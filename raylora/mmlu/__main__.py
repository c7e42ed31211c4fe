"""``python -m raylora.mmlu``: see ``raylora.commands.mmlu``."""

from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command("mmlu")
