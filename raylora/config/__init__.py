"""The options, each declared once with its help, and the sources that they come from."""
