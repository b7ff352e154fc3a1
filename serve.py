"""Serve a model on this machine: a page to write with it, and an API that OpenAI's clients can use.

    python serve.py                                     # the released checkpoint, on http://127.0.0.1:8000
    python serve.py runs/trm --port 8080
    python serve.py runs/trm --puzzle runs/sudoku4      # the page solves the boards of this puzzle model
    python serve.py --onnx onnx/trm                     # run an export of export_onnx.py with ONNX Runtime
    python serve.py --host 0.0.0.0 --api_key SECRET     # also for other machines, which must send this key

docs/server.md describes the API. Only programs of this machine can reach the server, unless --host says otherwise. All
messages go to stderr. Ctrl-C or SIGTERM ends it: running texts get --grace_seconds to end.
"""

import sys

from src.config import before_torch, parse_flags, run
from src.page.config import ServeConfig

__all__ = ["main", "parse_args"]


@before_torch
def parse_args(argv=None) -> ServeConfig:
    return parse_flags(__doc__, ServeConfig, argv=argv, positional="checkpoint")[0]


from src.page.app import create_app
from src.page.running import listen, serve
from src.page.service import open_service


def main(argv=None):
    config = parse_args(argv)
    with listen(config.host, config.port) as socket:
        if not config.is_local and config.api_key is None:
            others = f"warning: {config.host} can be reached by other machines, and without --api_key anyone may use it"
            print(others, file=sys.stderr)
        service = open_service(config)
        serve(create_app(service), service, socket)


if __name__ == "__main__":
    run(main)
