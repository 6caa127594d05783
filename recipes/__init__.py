"""Programs that read top to bottom and are meant to be copied."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from lowmem.config import RunConfig, load
from lowmem.errors import UserError


def main(run: Callable[[RunConfig], dict[str, Any]]) -> None:
    """Run a recipe, or a copy of it, from its own command line: one YAML file in, one JSON document out."""
    parser = argparse.ArgumentParser(description=(run.__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="YAML file with the settings of a run, as `lowmem cp demo` gives it")
    try:
        found = run(load(parser.parse_args().config))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
