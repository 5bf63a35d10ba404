"""Where weights, gradients and activations live while training, and how they move."""
