"""What a run found, for people to read: on the terminal, and as one page that needs nothing but a browser."""
