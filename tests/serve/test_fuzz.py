"""Requests with anything in any field: an answer or a refusal that names something, never a fault.

benchmarks/fuzz_server.py does the same from the OpenAPI document, at length.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")

from sidlm.serve.app import create_app  # noqa: E402
from sidlm.serve.config import ServeConfig  # noqa: E402
from sidlm.serve.schema import ChatRequest, CompletionRequest  # noqa: E402

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMES = ["role", "content", "type", "function", "name", "text", "1", "id", "schema", "tool_calls", "json_schema",
         "parameters", "arguments", "x"]  # fmt: skip
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from(["tiny", "user", "assistant", "tool", "f", "function", "json_schema", "required", "auto",
                         "text", "1", "<|eot_id|>"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    ),
    max_leaves=10,
)  # fmt: skip
GOOD = {
    "messages": st.sampled_from([[{"role": "user", "content": "x"}], [{"role": "system", "content": "<|eot_id|>"}]]),
    "tools": st.just([TOOL]),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}]),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "logprobs": st.booleans(),
    "stop": st.sampled_from(["a", ["a", "b"]]),
    "n": st.integers(1, 3),
}


def request(fields, needed):
    """Some fields of a request with something possible or anything at all in them, `needed` with something possible."""
    one = st.sampled_from(sorted(fields)).flatmap(
        lambda name: st.tuples(st.just(name), st.one_of(GOOD.get(name, JSON), JSON))
    )
    return st.lists(one, max_size=4).map(lambda chosen: needed | dict(chosen))


@pytest.fixture(scope="module")
def client(model, tokenizer):
    app = create_app(model, tokenizer, ServeConfig(name="tiny", max_new_tokens=6))
    with testclient.TestClient(app, raise_server_exceptions=False) as client:
        yield client


def check(answer):
    assert answer.status_code in (200, 400, 404, 413, 429), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"] and error["type"] in ("invalid_request_error", "rate_limit_error")


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
CHAT = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}


@given(request(ChatRequest.model_fields, CHAT))
@FUZZ
def test_chats(client, fields):
    check(client.post("/v1/chat/completions", content=dumps(fields)))


@given(request(CompletionRequest.model_fields, {"model": "tiny", "prompt": "x", "max_tokens": 4}))
@FUZZ
def test_completions(client, fields):
    check(client.post("/v1/completions", content=dumps(fields)))


@given(st.binary(max_size=40))
@FUZZ
def test_bytes(client, body):
    assert client.post("/v1/completions", content=body).status_code == 400


def dumps(fields):
    """JSON as sloppy clients write it, with NaN and lone surrogates."""
    return json.dumps(fields).encode()
