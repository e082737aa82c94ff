"""
What carries KV blocks, as UCX says it (`UCX_LOG_LEVEL=info UCX_PROTO_INFO=y`).

For each way to reach a peer, UCX prints a table like this one, in which the last row is that of large blocks:

    | ab6721d2 intra-node cfg#1                                                   |
    | remote memory read by ucp_get*(multi) into host memory from host            |
    +----------------+--------------------------+---------------------------------+
    | 0..inf         | zero-copy                | cma/memory                      |

It prints one only once it is needed. Before that there is a line with the lanes it has chosen:

    UCX  INFO  ab6721d2 intra-node cfg#1 rma_am(tcp/lo) amo_am(tcp/lo) am(tcp/lo cma/memory) ka(tcp/lo)
"""

import re
from collections.abc import Iterator
from typing import Final

PEER: Final = re.compile(r"\b(?:intra|inter)-node cfg#")
READ: Final = "remote memory read"
ROW: Final = re.compile(r"\| +\S*\.\.inf +\|.*\|(.*)\|")
LANES: Final = re.compile(r"\b(?:rma|rma_bw|rma_am|am|am_bw)\(([^)]*)\)")
TRANSPORT: Final = re.compile(
    r"\b(cuda_ipc|gdr_copy|cuda_copy|rc_\w+|ud_\w+|dc_\w+|gga_\w+|cma|knem|xpmem|sysv|posix|tcp)/"
)
"""UCX's names, as they stand before the device's."""


def transports_in(log: str) -> list[str]:
    """The transports by which peers' memory is read; those of the lanes, if UCX has printed no such table."""
    read = {name for cell in _reads(log) for name in TRANSPORT.findall(cell)}
    if read:
        return sorted(read)
    lanes = (cell for line in log.splitlines() if PEER.search(line) for cell in LANES.findall(line))
    return sorted({name for cell in lanes for name in TRANSPORT.findall(cell)})


def _reads(log: str) -> Iterator[str]:
    """The last column of the last row of each table about reading a peer's memory."""
    is_peer = is_read = False
    for line in log.splitlines():
        if "cfg#" in line:
            is_peer, is_read = PEER.search(line) is not None, False
        elif is_peer and READ in line:
            is_read = True
        elif is_read and (row := ROW.search(line)):
            yield row.group(1)
            is_read = False
