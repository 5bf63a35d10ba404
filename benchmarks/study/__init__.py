"""The study on the tiny world: which methods and savings reach what, at equal rollouts and equal forward units."""
