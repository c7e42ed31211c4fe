"""``python -m raylora.predict``: see ``raylora.commands.predict``."""

from raylora.commands.predict import main
from raylora.commands.run_command import run_command

if __name__ == "__main__":
    run_command(main)
