"""
Plan length-specialised stages from Python: which layout the planner proposes for a workload, and what it predicts.

    python examples/plan_stages.py
"""

from pathlib import Path

from cascadeinfer.evaluation.setting import load_setting


def main() -> None:
    """Plan for three request rates."""
    setting = load_setting("h200-llama-3.1-8b", Path("sample"), 8)
    for rate_per_s in (5.0, 20.0, 30.0):
        plan = setting.plan(rate_per_s)
        stages = ", ".join(f"{stage.range} x {stage.n_instances}" for stage in plan.stages)
        print(f"{rate_per_s:4.0f} requests/s: {stages}; predicted gain over one stage {plan.gain:.0%}")


if __name__ == "__main__":
    main()
