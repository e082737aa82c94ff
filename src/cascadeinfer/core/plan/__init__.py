"""
Planning: length histograms, stage layouts and the dynamic program that finds the best layout (pure).

Entry points: `plan`, `predict` and `capacity_rate` in `cascadeinfer.core.plan.planner`; `explain` in
`cascadeinfer.core.plan.explain`.
"""
