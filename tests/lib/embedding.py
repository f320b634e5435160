"""A program that uses the embedded PostgreSQL of the directory it is given.

It prints the URL. For each line of its input it sees to it that PostgreSQL runs and prints "ready";
with the end of the input it ends. What can never work is its last words.
"""

import signal
import subprocess
import sys
from pathlib import Path

import service

# What a shell runs behind, and whatever that starts, ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with service.embedded_postgres(Path(sys.argv[1])) as url:
        print(url, flush=True)
        for line in sys.stdin:
            if line == "bear\n":  # a child that inherits whatever a child can, and outlives this
                child = ("sleep", "1000")
                subprocess.Popen(child, close_fds=False, stdout=subprocess.DEVNULL)
            service.start_postgres(Path(sys.argv[1]))
            print("ready", flush=True)
except service.Misconfigured as error:
    sys.exit(str(error))
