"""Stands for an engine under a keeper: it says where it listens, and goes on until it is ended."""

import os
import sys
import threading
from pathlib import Path

from cascadeinfer.cluster.keeping import DOOR, KEEPER_PIPE_VARIABLE, STAGE


def main() -> None:
    """Be ready at once; end with the keeper."""
    folder = Path(sys.argv[1])
    (folder / STAGE).write_text("loading weights")
    (folder / f"{DOOR}.new").write_text(os.environ["DOOR"])
    (folder / f"{DOOR}.new").replace(folder / DOOR)
    lifeline = int(os.environ[KEEPER_PIPE_VARIABLE])
    threading.Thread(target=lambda: (os.read(lifeline, 1), os._exit(0)), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
