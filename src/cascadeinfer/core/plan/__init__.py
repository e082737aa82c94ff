"""
Planning: length histograms, stage layouts and the dynamic program that finds the best one (pure).

Entry points: `cascadeinfer.core.plan.planner` (`plan`, `predict`, `capacity_rate`) and `cascadeinfer.core.plan.explain` (`explain`).
"""
