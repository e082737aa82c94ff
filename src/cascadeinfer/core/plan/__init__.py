"""Planning: length histograms, stage layouts and the dynamic program that finds the best one (pure)."""
