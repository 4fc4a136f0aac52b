"""Command line."""
import os

import trio

from gateway.app import serve
from gateway.config import load_configuration
def main() -> int:
    conf = load_configuration(os.environ, bind="127.0.0.1:8000")
    trio.run(lambda: serve(conf, announce=lambda u: print(u, flush=True)))
    return 0
