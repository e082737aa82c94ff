"""A part that failed or did not end in time is a finding, too: what it did last, why it ended, and what helps."""

import re
import signal
from typing import Final

from cascadeinfer.doctor.facts import End, Gathered
from cascadeinfer.doctor.verdicts import Check, fault

TITLES: Final = {
    "name": "host name",
    "machine": "machine",
    "software": "software",
    "devices": "devices",
    "doors": "engines that run",
    "trial": "instances",
    "kernels": "mixed lengths",
}
"""What a part's failure is called in the table."""
HANGS: Final = {
    "name": "name this machine in /etc/hosts, or repair its name server",
    "software": "look at UCX_NET_DEVICES and UCX_TLS: making a NIXL agent asks every network device",
    "devices": "nvidia-smi hangs with a broken driver or GPU: dmesg | grep -i xid; restart the machine",
    "trial": "on a slow machine: --patience 4; else attach the report to an issue",
}
ISSUE: Final = "attach the report (--json FILE) to an issue"
CAUSES: Final = (
    (r"CUDA out of memory|Free memory on device|No available memory for the cache blocks",
     "end what uses the GPU (nvidia-smi lists it)"),
    (r"No space left on device|Bus error", "make room in /dev/shm and in TMPDIR; docker run --shm-size 8g"),
    (r"Too many open files", "raise the limit of open files: ulimit -n 65535"),
    (r"Cannot allocate memory|MemoryError", "free memory, or raise the container's limit"),
    (r"Illegal instruction", "this build of vLLM does not fit the processor: it needs AVX2 or AVX-512"),
    (r"NVRTC|no kernel image is available", "this build of torch does not fit the GPU: install one for its capability"),
    (r"Failed to infer device type", "vLLM finds no device: install the build for this machine (see vLLM above)"),
    (r"No module named", "reinstall the engine (see vLLM above)"),
)  # fmt: skip
"""What is known of reasons, by what the output says."""
SIGNALS: Final = {
    signal.SIGKILL: "killed, most likely for its memory: free some, or raise the container's limit (dmesg says so)",
    signal.SIGILL: "this build of vLLM does not fit the processor: it needs AVX2 or AVX-512",
    signal.SIGBUS: "make room in /dev/shm; docker run --shm-size 8g",
    signal.SIGSEGV: ISSUE,
}
PREFIX: Final = r"(?:\([^)]*\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] )?"
"""Of a process and of vLLM's logger, before a line of a traceback."""
REASON: Final = re.compile(PREFIX + r"(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt)\b.*)")
ELSEWHERE: Final = ("root cause above", "did not start")
"""In errors that only repeat that there was one."""
REASON_CHARACTERS: Final = 300


def failure_checks(gathered: Gathered) -> list[Check]:
    """The finding about a part that did not end well; none if it did."""
    name = TITLES[gathered.part]
    meanwhile = f" while {gathered.doing}" if gathered.doing else ""
    match gathered.end:
        case End.DONE:
            return []
        case End.TIMED_OUT:
            found = f"no end within {gathered.limit_s:g} s{meanwhile}; it was stopped"
            return [fault(name, found, HANGS.get(gathered.part, ISSUE))]
        case End.FAILED:
            return [_failed(name, gathered, meanwhile)]


def _failed(name: str, gathered: Gathered, meanwhile: str) -> Check:
    if gathered.code < 0:
        number = signal.Signals(-gathered.code)
        return fault(name, f"ended by {number.name}{meanwhile}", SIGNALS.get(number, ISSUE))
    found = f"failed{meanwhile}: {reason_in(gathered.output)}"
    return fault(name, found, next((fix for said, fix in CAUSES if re.search(said, gathered.output)), ISSUE))


def reason_in(output: str) -> str:
    """The last line that names an error and not another one's consequence; or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [found.group(1) for line in lines if (found := REASON.fullmatch(line))]
    causes = [text for text in named if not any(said in text for said in ELSEWHERE)]
    return (causes or named or lines or ["it said nothing"])[-1][:REASON_CHARACTERS]
