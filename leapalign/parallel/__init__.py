"""One run on several processes: who this one is, what all agree on, and weights of which each holds a part."""
