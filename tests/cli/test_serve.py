"""``sid serve`` as a process of its own: it starts, answers, and ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

import sidlm

pytest.importorskip("uvicorn")


def start(*argv):
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(sidlm.__file__))}
    command = [sys.executable, "-m", "sidlm.cli.main", "serve", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_starts_answers_and_ends(demo_run, stop):
    process = start(demo_run, "--port", 0, "--name", "demo", "--max-new-tokens", 7)
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), process.stderr.read()
        base = line.split()[-1]
        body = json.dumps({"model": "demo", "prompt": "The cat", "max_tokens": 5}).encode()
        request = urllib.request.Request(f"{base}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] in range(1, 6)
        process.send_signal(stop)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.wait()


def test_an_address_that_cannot_be_had(fails, demo_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert fails("serve", demo_run, "--port", port) == f"cannot listen on 127.0.0.1:{port}: Address already in use"
    assert "cannot listen on 203.0.113.1:8000" in fails("serve", demo_run, "--host", "203.0.113.1")


def test_what_is_missing_is_named(fails, demo_run, monkeypatch, tmp_path):
    import importlib.util

    assert "no such folder" in fails("serve", tmp_path / "nothing")
    assert "must be at least 1, got 0" in fails("serve", demo_run, "--max-new-tokens", 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert fails("serve", demo_run) == "sid serve needs uvicorn: pip install 'sidlm[serve]'"
