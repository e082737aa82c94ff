"""
What a step costs, and the service that results.

- `cascadeinfer.core.cost.latency`: the step model, coefficients and compiled form.
- `cascadeinfer.core.cost.splitkv`: how attention backends cut KV into thread blocks, simulated.
- `cascadeinfer.core.cost.heterogeneity`: the same reduced to coefficients of the step model.
- `cascadeinfer.core.cost.fit`: coefficients from measured steps, with error bars.
- `cascadeinfer.core.cost.profile`: profile files.
"""
