"""``sid serve``: an OpenAI-compatible HTTP server over one model."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from typing import TYPE_CHECKING

from sidlm.cli.common import Parser, add_device, load, number
from sidlm.errors import SidError

if TYPE_CHECKING:
    from fastapi import FastAPI


def main(argv: list[str]) -> int:
    parser = Parser(
        "serve",
        "Serve a model to clients of the OpenAI API: chat, completions, tools, JSON schemas, log-probabilities.\n"
        "Requests are computed one after another. Needs the extra: pip install 'sidlm[serve]'.",
        "  sid serve runs/demo --port 8000\n"
        "  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        '    -d \'{"model": "sid", "prompt": "def main(", "max_tokens": 32}\'',
    )
    parser.add_argument("model", help="model folder, or the run folder of a training")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="default: 8000; 0 takes a free one")
    parser.add_argument("--name", default="sid", help="name of the model in the API; default: sid")
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), default=4096, metavar="N", help="of one choice; default: 4096"
    )
    parser.add_argument("--max-queue", type=number(int, 0), default=64, metavar="N", help="requests that may wait (64)")
    parser.add_argument(
        "--max-body-bytes", type=number(int, 1), default=4_000_000, metavar="N", help="of one request (4000000)"
    )
    parser.add_argument("--request-seconds", type=number(float, 0), default=600.0, help="time for one choice (600)")
    parser.add_argument("--shutdown-seconds", type=number(float, 0), default=10.0, help="time to end in (10)")
    parser.add_argument(
        "--tool-format",
        choices=("json", "function_tag", "python_list"),
        default="json",
        help="how the model is asked to call tools; only json can be forced (default)",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SidError(f"sid serve needs {' and '.join(missing)}: pip install 'sidlm[serve]'")
    from sidlm.serve.config import ServeConfig

    config = ServeConfig(
        name=args.name,
        max_new_tokens=args.max_new_tokens,
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_bytes,
        request_seconds=args.request_seconds,
        shutdown_seconds=args.shutdown_seconds,
        tool_format=args.tool_format,
    )
    with _listening(args.host, args.port) as listener:
        model, tokenizer = load(args.model, args.device)
        from sidlm.serve.app import create_app

        _run(create_app(model, tokenizer, config), listener, config.shutdown_seconds)
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket on this address, before anything is loaded. Raises SidError if there is none to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SidError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        if os.name == "posix":  # an address whose last user has just ended is free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SidError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def _run(app: FastAPI, listener: socket.socket, shutdown_seconds: float) -> None:
    """Serve until SIGINT or SIGTERM; requests then get some time to end."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                print(f"listening on http://{shown}:{port}/v1", flush=True)

    grace = max(1, round(shutdown_seconds))
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace))
    # uvicorn raises the signal again once it is done, for whoever started it: it has done all that there is to do
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
