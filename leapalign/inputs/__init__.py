"""What comes from outside, checked, and what a user is told of it."""
