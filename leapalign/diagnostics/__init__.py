"""What a run finds out about itself: samples that are not finite, thresholds that do not suit, the true gradient."""
