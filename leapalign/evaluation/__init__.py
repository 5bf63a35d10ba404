"""Images from a model, and a run's images scored beside its base's."""
