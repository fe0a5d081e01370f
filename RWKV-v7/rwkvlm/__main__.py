"""`python -m rwkvlm <command>`."""

import signal
import sys

from .cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts a background command with SIGINT ignored
    sys.exit(main())
