"""Files that outlast a crash, and tell when they were damaged."""
