"""The times of an instance's supervision from the options of `serve`."""

from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.runtime.supervise import SupervisionTimes


def supervision_of(options: ServeOptions) -> SupervisionTimes:
    """How often instances are asked, and how long they may be silent."""
    return SupervisionTimes(
        report_s=options.report_interval_s,
        idle_report_s=options.idle_report_interval_s,
        suspect_s=options.suspect_after_s,
        hang_s=options.hang_timeout_s,
    )
