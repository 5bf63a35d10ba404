"""A run's weights as other software reads them."""
