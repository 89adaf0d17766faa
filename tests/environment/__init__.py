"""What dev.py sets up in .dev/. It uses only the standard library: nothing is installed yet."""
