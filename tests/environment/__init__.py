"""What dev.py sets up under .dev/. Standard library only: it runs before anything is installed."""
