"""What can only be checked once the instances run."""

from cascadeinfer.config.profiles import check_profile
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.runtime.shell import Runtime


async def check_running(runtime: Runtime, options: ServeOptions) -> None:
    """
    Compare the options with what runs.

    Raises:
        ConfigError: There are prefill stages, and requests cannot leave an instance.
        ProfileError: The profile was measured on another model or set-up than one of them.
    """
    check_roles(runtime, options)
    await check_profile(runtime, options)


def check_roles(runtime: Runtime, options: ServeOptions) -> None:
    """
    Check that requests can leave prefill stages, if there are any.

    Raises:
        ConfigError: They cannot.
    """
    if POLICIES[options.policy_name()].roles is None:
        return
    roles = options.roles()
    if roles is None or not roles.prefill:
        return
    stuck = [engine.instance_id for engine in runtime.live_engines() if not engine.movable]
    if stuck:
        raise ConfigError(
            f"requests cannot move away from instance {stuck[0]} (its log says why), so prefill stages would get none",
            option="--stages",
            fix="leave prefill@ out",
        )
