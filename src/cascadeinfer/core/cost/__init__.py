"""What a step costs: features of a batch, the fitted model, split-KV rules of the attention backends, profiles (pure)."""
