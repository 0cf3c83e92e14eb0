"""Bring the pages that are generated from the cards up to date; with --check, fail if one is not."""

import sys
from pathlib import Path

from wellposed.papers.pages import stale, write

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    if "--check" in sys.argv:
        old = [str(path.relative_to(ROOT)) for path in stale(ROOT)]
        if old:
            print(f"out of date (run make docs): {', '.join(old)}", file=sys.stderr)
        return 1 if old else 0
    for path in write(ROOT):
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
