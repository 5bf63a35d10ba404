"""The embedded world: pictures, judge, model, rewards and the demo."""
