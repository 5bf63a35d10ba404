"""Prompts: files of them, the order of a run, and their embeddings on disk."""
