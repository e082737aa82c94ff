"""Ray's custom resources on the command line."""

import math

from cascadeinfer.core.errors import ConfigError


def custom_resources(text: str | None) -> dict[str, float]:
    """
    Ray's custom resources in `--ray-resources`.

    Raises:
        ConfigError: It is not NAME=AMOUNT,NAME=AMOUNT.
    """
    resources = {}
    for part in text.split(",") if text else ():
        name, _, amount = part.strip().partition("=")
        try:
            value = float(amount)
        except ValueError:
            value = 0.0
        if not name or not 0.0 < value < math.inf or name in {"CPU", "GPU"}:
            raise ConfigError(
                f"{part!r} is not NAME=AMOUNT",
                option="--ray-resources",
                fix="write e.g. engine=1; CPUs and GPUs have options of their own",
            )
        resources[name] = value
    return resources
