"""
Starts a part of the GPU check: `python part.py MODULE --device cuda|cpu --rows FILE ...`.

The processes of engines import the main program again (spawn). They find nothing here: vLLM's worker looks into every
loaded module, and some that the parts use (numba) would end it.
"""

import importlib
import sys

if __name__ == "__main__":
    importlib.import_module(sys.argv.pop(1)).main()
