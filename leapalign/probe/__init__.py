"""Where a reward's gradient leads, on latents alone: the climb, and a page that shows it."""
