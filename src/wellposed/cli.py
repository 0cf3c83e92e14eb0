"""The command `wellposed`. Starts fast: torch is imported by the commands that train, not before."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; needs the extra [lab]."""
    try:
        from .commands import run
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        print("error: the command needs more packages: pip install 'wellposed[lab]'", file=sys.stderr)
        raise SystemExit(1) from error
    raise SystemExit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
