"""`python -m lowmem COMMAND` is `lowmem COMMAND`, also where the script is not on the path."""

from __future__ import annotations

import importlib

if __name__ == "__main__":
    importlib.import_module("lowmem.cli").app(prog_name="lowmem")
