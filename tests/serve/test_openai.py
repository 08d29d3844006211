"""The server through OpenAI's own client."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from serve.live import serving  # noqa: E402
from sidlm.post.chat import ChatFormat, Message, with_tools  # noqa: E402

ASK = [{"role": "system", "content": "the house"}, {"role": "user", "content": "a cat <|eot_id|> 数学"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def url(model, tokenizer):
    with serving(model, tokenizer) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(**({"model": "tiny", "messages": ASK, "max_tokens": 12} | options))


def greedy_ids(model, prompt, new, vocab_size):
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :vocab_size].argmax()))
    return ids[len(prompt) :]


def test_chat_is_the_model_on_the_chat_format(client, model, tokenizer):
    """No more and no less: text that spells a control token is text."""
    prompt = ChatFormat(tokenizer).encode([Message(**message) for message in ASK])
    answer = chat(client, temperature=0)
    ids = greedy_ids(model, prompt, 12, tokenizer.vocab_size)
    stops = [i for i, token in enumerate(ids) if token in ChatFormat(tokenizer).stop_ids]
    expected = ids[: stops[0]] if stops else ids
    assert answer.choices[0].message.content == tokenizer.decode(expected, skip_special=True)
    assert answer.choices[0].finish_reason == ("stop" if stops else "length")
    assert answer.object == "chat.completion" and answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected) + bool(stops)


def test_a_stream_is_the_same_text(client):
    whole = chat(client, temperature=0)
    stream = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == whole.choices[0].message.content
    assert stream[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == whole.choices[0].finish_reason
    assert stream[-1].usage == whole.usage and not stream[-1].choices
    assert len({c.id for c in stream}) == 1 and all(c.object == "chat.completion.chunk" for c in stream)


def test_seeds_and_choices(client):
    one, same, other = (chat(client, seed=s, n=2, temperature=1.5).choices for s in (1, 1, 5))
    texts = [[c.message.content for c in choices] for choices in (one, same, other)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    assert [c.index for c in one] == [0, 1]
    streamed = ["", ""]
    for chunk in chat(client, seed=1, n=2, temperature=1.5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts[0]


def test_sampling_fields_have_an_effect(client):
    greedy = chat(client, temperature=0).choices[0].message.content
    for field in ({"top_p": 0.0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert chat(client, temperature=1.5, **field).choices[0].message.content == greedy, field
    for field in (
        {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"extra_body": {"repetition_penalty": 5.0}},
        {"logit_bias": {"70": 100}},
    ):  # fmt: skip
        assert chat(client, temperature=0, max_tokens=40, **field).choices[0].message.content != greedy, field
    assert chat(client, temperature=0, max_tokens=None, max_completion_tokens=3).usage.completion_tokens <= 3


def test_log_probabilities(client, model, tokenizer):
    answer = chat(client, temperature=0, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    ids = ChatFormat(tokenizer).encode([Message(**message) for message in ASK])
    for entry in entries:
        with torch.no_grad():
            values = model(torch.tensor([ids])).logits[0, -1, : tokenizer.vocab_size].log_softmax(dim=-1)
        token = int(values.argmax())
        assert math.isclose(entry.logprob, float(values[token]), abs_tol=1e-4)
        assert entry.token == tokenizer.decode([token]) and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob >= entry.top_logprobs[1].logprob
        ids.append(token)
    said = [entry for entry in entries if entry.token not in tokenizer.special_ids]
    text = b"".join(bytes(entry.bytes) for entry in said).decode(errors="replace")
    assert text == answer.choices[0].message.content
    streamed = [
        entry
        for chunk in chat(client, temperature=0, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries
    assert chat(client).choices[0].logprobs is None


def test_stop_strings(client):
    text = chat(client, temperature=0, max_tokens=40).choices[0].message.content
    stop = text[5:8]
    for stream in (False, True):
        answer = chat(client, temperature=0, max_tokens=40, stop=[stop, "never"], stream=stream)
        if stream:
            chunks = list(answer)
            found = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert found == text[: text.index(stop)] and reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_followed(client, stream):
    schema = {"name": "trip", "schema": PARAMETERS, "strict": True}
    for seed in range(3):
        answer = chat(client, max_tokens=60, seed=seed, temperature=1.8, stream=stream,
                      response_format={"type": "json_schema", "json_schema": schema})  # fmt: skip
        text = "".join(c.choices[0].delta.content or "" for c in answer) if stream else None
        value = json.loads(text if stream else answer.choices[0].message.content)
        assert value["city"] in ("Oslo", "Ulm") and 1 <= value["days"] <= 9


def test_json_objects(client):
    texts = []
    for seed in range(4):
        choice = chat(client, max_tokens=64, seed=seed, response_format={"type": "json_object"}).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            texts.append(json.loads(choice.message.content))
    assert all(isinstance(value, dict) for value in texts)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_forced_calls(client, choice):
    other = {"type": "function", "function": {"name": "other", "parameters": PARAMETERS}}
    tools = [TOOL] if choice == "required" else [other, TOOL]
    answer = chat(client, max_tokens=60, seed=3, tools=tools, tool_choice=choice, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and 1 <= json.loads(call.function.arguments)["days"] <= 9
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    chunks = list(chat(client, max_tokens=60, seed=3, tools=tools, tool_choice=choice, stream=True))
    (streamed,) = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert streamed[0].function.model_dump() == call.function.model_dump() and streamed[0].index == 0
    assert not any(c.choices[0].delta.content for c in chunks) and chunks[-1].choices[0].finish_reason == "tool_calls"


def test_answers_of_tools_go_back(client, tokenizer):
    """A whole round: the answer's own objects are sent back as they came."""
    first = chat(client, max_tokens=60, seed=3, tools=[TOOL], tool_choice="required").choices[0].message
    call = first.tool_calls[0]
    rounds = [*ASK, first, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees <|eom_id|>"}]
    second = chat(client, messages=rounds, tools=[TOOL], temperature=0)
    dialogue = [Message(**message) for message in ASK]
    from sidlm.post.tools import ToolCall

    made = ToolCall(name="weather", arguments=json.loads(call.function.arguments))
    dialogue += [
        Message(role="assistant", tool_calls=(made,)),
        Message(role="ipython", content="12 degrees <|eom_id|>"),
    ]
    offered = with_tools(dialogue, [TOOL])
    assert second.usage.prompt_tokens == len(ChatFormat(tokenizer).encode(offered))


def test_completions(client, model, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("the cat")]
    expected = tokenizer.decode(greedy_ids(model, ids, 10, tokenizer.vocab_size), skip_special=True)
    for prompt in ("the cat", ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0, logprobs=2)
        choice = answer.choices[0]
        assert choice.text == expected and choice.finish_reason == "length"
        assert len(choice.logprobs.tokens) == 10 and len(choice.logprobs.top_logprobs[0]) == 2
        assert choice.logprobs.text_offset[0] == 0
    both = client.completions.create(model="tiny", prompt=["the cat", "a dog"], max_tokens=10, temperature=0)
    assert len(both.choices) == 2 and both.choices[0].text == expected
    assert both.usage.prompt_tokens == len(ids) + len(tokenizer.encode("a dog")) + 1
    chunks = client.completions.create(model="tiny", prompt="the cat", max_tokens=10, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == expected


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'huge' does not exist"):
        client.models.retrieve("huge")
    with pytest.raises(openai.NotFoundError, match="'huge' does not exist"):
        chat(client, model="huge")


USER = {"role": "user", "content": "x"}
LONG = {"role": "user", "content": "ж" * 490}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "messages.0.role", "'system', 'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", ""),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name", "unsupported field"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "without content"),
        ({"messages": [USER, {"role": "tool", "tool_call_id": "1", "content": "x"}]}, "messages.1.tool_call_id", "'1'"),
        ({"messages": [{"role": "user", "content": "x" * 1100}]}, "messages", "the model's context holds 1024"),
        ({"max_tokens": 65}, "max_tokens", "65 tokens asked for, this server allows 64"),
        ({"messages": [LONG], "max_tokens": 60}, "max_tokens", "model's 1024 positions"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"n": 9}, "n", "this server allows 8"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"330": 1}}, "logit_bias", "outside the vocabulary of 330"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"extra_body": {"frequency_penality": 1}}, "frequency_penality", "unknown or unsupported field"),
        ({"store": True}, "store", "only false is supported"),
        ({"store": 0}, "store", "valid boolean"),
        ({"metadata": {"a": "b"}}, "metadata", "unsupported field"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported field"),
        ({"modalities": ["text", "audio"]}, "modalities", "at most 1"),
        ({"response_format": SCHEMA}, "response_format.json_schema.schema", "strin"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs a json_schema"),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format", "exclude each other"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [TOOL, TOOL]}, "tools", "two tools have the name 'weather'"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "forces a call"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(client, options, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert caught.value.param is not None and caught.value.param.startswith(param)
    assert message in caught.value.message and caught.value.type == "invalid_request_error"


def test_completions_refuse_by_name(client):
    for options, param in (
        ({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": [400]}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["x"] * 9}, "prompt"),
        ({"prompt": "x" * 1100}, "prompt"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**({"model": "tiny", "prompt": "x"} | options))
        assert caught.value.param.startswith(param)
