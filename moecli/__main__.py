"""`python -m moecli` and the `moecli` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    from moecli.cli.main import run

    code = run(sys.argv[1:] if argv is None else list(argv))
    if code and "RANK" in os.environ:  # with an exchange that broke off, the interpreter would wait for it to end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
