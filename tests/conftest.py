"""Shared fixtures. Property tests run a fixed, derandomised set of examples, so that CI is repeatable."""

from hypothesis import HealthCheck, settings

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")
