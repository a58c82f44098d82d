"""Long measurements: each module is one command and prints one table."""
