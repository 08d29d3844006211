"""A server in a thread of the test, on a port of its own."""

from __future__ import annotations

import contextlib
import threading
import time

import uvicorn

from sidlm.serve.app import create_app
from sidlm.serve.config import ServeConfig


@contextlib.contextmanager
def serving(model, tokenizer, *, grace=5, **config):
    """Gives the server's address while it runs."""
    app = create_app(model, tokenizer, ServeConfig(**({"name": "tiny", "max_new_tokens": 64} | config)))
    settings = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=grace)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
