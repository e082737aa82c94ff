"""Run-time balance: range refinement between stages and the bid-ask protocol between instances (pure)."""
