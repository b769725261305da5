"""What `launch convert` runs: both directions of the converter, with a line of progress a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from learner.convert.folders import hf_to_mcore, mcore_to_hf
from learner.errors import LearnerError


def main() -> int:
    """Convert as the command line says; 2 and one line on standard error if it cannot be done."""
    parser = argparse.ArgumentParser(prog="launch convert")
    parser.add_argument("direction", choices=("hf-to-mcore", "mcore-to-hf"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--like", type=Path)
    args = parser.parse_args()
    try:
        if args.direction == "hf-to-mcore":
            hf_to_mcore(args.source, args.out, _report)
        else:
            mcore_to_hf(args.source, args.like, args.out, _report)
    except LearnerError as error:
        print(f"launch convert: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def _report(done: int, total: int) -> None:
    print(f"{done}/{total} files", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
