"""The training simulated on tensors without memory: what it needs, and which settings fit."""
