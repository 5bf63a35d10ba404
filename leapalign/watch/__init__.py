"""The watch on reward hacking: held-out prompts measured during a run."""
