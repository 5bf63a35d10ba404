"""The command line."""

from leapalign.cli.main import main

__all__ = ["main"]
