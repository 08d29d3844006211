"""Limits, disconnects, the queue, health, metrics and malformed requests; the server stays up through all of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn")

from serve.live import serving
from sidlm.serve import engine


class Server:
    """A client that sends what it is told, well formed or not."""

    def __init__(self, url: str) -> None:
        self.host, self.port = url.removeprefix("http://").split(":")

    def send(self, method: str, path: str, body=None, headers=None):
        """Status, parsed or plain body, headers."""
        connection = http.client.HTTPConnection(self.host, int(self.port), timeout=30)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": "application/json"} | (headers or {})
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        kind = answer.getheader("Content-Type", "")
        return answer.status, json.loads(text) if kind == "application/json" else text, answer.headers

    def complete(self, **fields):
        return self.send("POST", "/v1/completions", {"model": "tiny", "prompt": "the", "max_tokens": 4} | fields)

    def metrics(self) -> dict[str, float]:
        status, text, _ = self.send("GET", "/metrics")
        assert status == 200
        samples = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in samples}

    def until(self, true, seconds=20):
        end = time.monotonic() + seconds
        while not true(self.metrics()):
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with serving(model, tokenizer, max_body_bytes=20_000, max_new_tokens=900, body_seconds=0.5) as url:
        yield Server(url)


@pytest.fixture(autouse=True)
def up_after(request):
    """After each test the server that it used answers."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        assert server.complete()[0] == 200 and server.send("GET", "/health")[:2] == (200, {"status": "ok"})
        server.until(lambda m: m["sid_requests_running"] == m["sid_requests_waiting"] == 0)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "body"),
        (b"{", 400, "JSON decode error"),
        (b"[]", 400, "body: Input should be"),
        (b"null", 400, "body"),
        (b"\xff\xfe", 400, ""),
        (b"[" * 9000, 400, ""),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, 400, ""),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', 400, ""),
        (b'{"model": "\\ud83d\\ude00", "prompt": "x"}', 404, "does not exist"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 1e3}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": [1, 2, "x"]}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": [[]]}', 400, "prompt"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else None,
)
def test_malformed_requests(server, body, status, message):
    got, answer, _ = server.send("POST", "/v1/completions", body)
    assert got == status and message in answer["error"]["message"]


def test_wrong_content_type_path_and_method(server):
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    assert server.send("POST", "/v1/completions", body, {"Content-Type": "text/plain"})[0] == 400
    status, answer, _ = server.send("GET", "/nothing")
    assert status == 404 and answer["error"]["message"] == "Not Found"
    status, answer, headers = server.send("GET", "/v1/completions")
    assert status == 405 and headers["Allow"] == "POST" and "error" in answer


def test_a_long_request_is_not_read(server):
    status, answer, headers = server.complete(prompt="x" * 20_001)
    assert status == 413 and "this server takes 20000" in answer["error"]["message"]
    assert headers["Connection"] == "close"
    with socket.create_connection((server.host, int(server.port)), timeout=10) as raw:  # without telling its length
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.sendall(b"2800\r\n" + b"x" * 0x2800 + b"\r\n")
        raw.sendall(b"2800\r\n" + b"x" * 0x2800 + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_request_that_never_ends(server):
    with socket.create_connection((server.host, int(server.port)), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_garbage_instead_of_http(server):
    with socket.create_connection((server.host, int(server.port)), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01 no http at all\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work(server, stream):
    before = server.metrics()
    body = json.dumps(
        {"model": "tiny", "prompt": "the", "max_tokens": 900, "stream": stream, "logit_bias": BAN}
    ).encode()
    with socket.create_connection((server.host, int(server.port)), timeout=10) as raw:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        raw.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
        server.until(lambda m: m["sid_requests_running"] == 1)
    server.until(lambda m: m["sid_requests_running"] == 0)
    after = server.metrics()
    made = after["sid_generated_tokens_total"] - before["sid_generated_tokens_total"]
    assert made < 880 and after["sid_cancelled_total"] == before["sid_cancelled_total"] + 1


BAN = {"314": -100, "315": -100}
"""Never the two tokens that could end the text."""


def in_threads(count, call):
    results = [None] * count
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, call(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_a_full_queue_is_said(model, tokenizer):
    with serving(model, tokenizer, max_queue=2, max_new_tokens=400) as url:
        server = Server(url)
        answers = in_threads(8, lambda _: server.complete(max_tokens=200, logit_bias=BAN))
        statuses = sorted(status for status, _, _ in answers)
        assert statuses.count(200) >= 3 and statuses.count(429) >= 1 and len(set(statuses)) == 2
        busy = next(answer for answer in answers if answer[0] == 429)
        assert busy[1]["error"]["type"] == "rate_limit_error" and busy[2]["Retry-After"] == "1"
        assert server.complete()[0] == 200


def test_requests_together_are_requests_alone(server):
    def ask(i):
        return server.complete(seed=i, max_tokens=12, temperature=1.3)[1]["choices"]

    alone = [ask(i) for i in range(6)]
    assert in_threads(6, ask) == alone


def test_time_runs_out(model, tokenizer):
    with serving(model, tokenizer, request_seconds=0.5, max_new_tokens=1000) as url:
        server = Server(url)
        status, answer, _ = server.complete(max_tokens=1000, logit_bias=BAN)
        assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 1000
    with serving(model, tokenizer, request_seconds=1e-9) as url:
        status, answer, _ = Server(url).complete()
        assert status == 503 and answer["error"]["code"] == "timeout"
        status, text, _ = Server(url).complete(stream=True)
        assert status == 200 and '"code": "timeout"' in text and "[DONE]" not in text


def test_stopping_the_server_ends_what_runs(model, tokenizer):
    """The connection is closed, the work stops, and the server is gone in time."""
    received = []

    def ask(url):
        body = {"model": "tiny", "prompt": "the", "max_tokens": 1000, "logit_bias": BAN, "stream": True}
        with contextlib.suppress(OSError, http.client.HTTPException):
            received.append(Server(url).send("POST", "/v1/completions", body)[1])

    with serving(model, tokenizer, max_new_tokens=1000, grace=1) as url:
        threads = [threading.Thread(target=ask, args=(url,), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        server = Server(url)
        server.until(lambda m: m["sid_requests_running"] == 1 and m["sid_requests_waiting"] == 2)
        start = time.monotonic()
    assert time.monotonic() - start < 10  # a busy machine, beside another test process
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sum("[DONE]" in text for text in received) < 3


def test_a_fault_is_one_requests(server, monkeypatch):
    """Something broke inside: 500 without a word of it, or an error in the stream; the next request is served."""

    def broken(*args, **kwargs):
        raise RuntimeError("secret")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", broken)
        status, answer, _ = server.complete()
        assert status == 500 and answer["error"]["message"] == "internal error"
        with contextlib.suppress(http.client.IncompleteRead):
            status, text, _ = server.complete(stream=True)
            assert status == 200 and "internal error" in text and "secret" not in text


def test_metrics_are_prometheus_text(server):
    server.complete(max_tokens=3)
    status, text, headers = server.send("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'[a-z_]+(\{([a-z]+="[^"\\\n]*",?)+\})? [0-9.e+-]+')
    lines = text.splitlines()
    assert all(line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line) for line in lines)
    names = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    assert {"sid_http_requests_total", "sid_generated_tokens_total", "sid_queue_seconds"} <= names
    metrics = server.metrics()
    assert metrics['sid_http_requests_total{method="POST",path="/v1/completions",status="200"}'] >= 1
    assert metrics["sid_first_token_seconds_count"] == metrics['sid_first_token_seconds_bucket{le="+Inf"}']
    assert not any("/nothing" in name for name in metrics)  # a client must not choose labels


def test_a_tokenizer_without_a_chat_format_still_completes(tokenizer):
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from serve.conftest import tiny_model
    from sidlm.data.tokenizer import Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    plain = Tokenizer(backend, bos="</s>", eos="</s>", pad="</s>")
    # more rows than tokens: what has no text is never chosen
    with serving(tiny_model(plain, vocab_size=400), plain) as url:
        server = Server(url)
        status, answer, _ = server.complete(max_tokens=60, temperature=2.0, logprobs=20)
        assert status == 200 and answer["usage"]["completion_tokens"] > 0
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
        status, answer, _ = server.send("POST", "/v1/chat/completions", chat)
        assert status == 400 and "has no chat format" in answer["error"]["message"]
