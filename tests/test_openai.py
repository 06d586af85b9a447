"""OpenAI's interface: what clients of many kinds send, and what they get."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.sampling import row_seed
from nanochat.serving.job import Answer, Cut, Job, score_prompt
from nanochat.serving.openai_api import REFUSED
from nanochat.serving.schema import ApiError, Limits, Message, turns
from tests.helpers import make_model, until
from tests.helpers_server import (
    MODEL,
    USER,
    Script,
    chat,
    events,
    in_background,
    is_idle,
    send_raw,
    serving,
    tool_script,
    totals,
)

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def engine(tokenizer):
    config = GPTConfig(
        sequence_len=128, vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=16
    )
    return Engine(make_model(config, spread=0.5).eval(), tokenizer)


@pytest.fixture(scope="module")
def shared(tokenizer):
    """One server for all tests that only ask; its engine, which says hello, has the prompts."""
    script = Script(tokenizer)
    with serving(script) as server:
        server.script = script
        yield server


def chunks(response):
    """What a stream consists of."""
    assert response.text.endswith("data: [DONE]\n\n")
    return events(response.text.split("\n")[:-3])


def text_of(choice):
    """The text of a choice of whatever kind, whole or in chunks."""
    return choice["text"] if "text" in choice else choice.get("message", choice.get("delta")).get("content", "")


def spoken(tokenizer, script):
    """The last prompt that the engine got, as text."""
    return tokenizer.decode(script.prompts[-1])


# ---------------------------------------------------------------------------------------------------------
# Conversations as they come

TEXT = {"type": "text", "text": "a"}
CONVERSATIONS = [  # roles by their first letter, contents; as the model gets them
    ("su", ["S", "q"], "u:S\n\nq"),
    ("dssu", ["D", "S", "T", "q"], "u:D\n\nS\n\nT\n\nq"),
    ("uasu", ["q", "A", "S", "r"], "u:q a:A u:S\n\nr"),
    ("uaus", ["q", "A", "r", "S"], "u:q a:A u:r\n\nS"),
    ("s", ["S"], "u:S"),
    ("uu", ["q", "r"], "u:q\n\nr"),
    ("uaau", ["q", "A", "B", "r"], "u:q a:A\n\nB u:r"),
    ("au", ["A", "q"], "u: a:A u:q"),
    ("ua", ["q", "A"], "u:q a:A"),
    ("a", ["A"], "u: a:A"),
    ("uau", ["q", "", "r"], "u:q a: u:r"),
    ("uau", ["q", None, "r"], "u:q a: u:r"),
    ("suu", ["", "q", None], "u:q"),
    ("uatu", ["q", None, "5", "r"], "u:q a: u:5\n\nr"),
    ("uafa", ["q", None, "5", "A"], "u:q a: u:5 a:A"),
    ("u", [[TEXT, {"type": "input_text", "text": "b"}, "c"]], "u:abc"),
    ("ua", ["q", [{"type": "output_text", "text": "A"}, {"type": "refusal", "refusal": "B"}]], "u:q a:AB"),
]
ROLES = {role[0]: role for role in ("system", "developer", "user", "assistant", "tool", "function")}


@pytest.mark.parametrize(("roles", "contents", "expected"), CONVERSATIONS)
def test_conversations_as_they_come(roles, contents, expected):
    messages = [Message(role=ROLES[r], content=content) for r, content in zip(roles, contents, strict=True)]
    assert " ".join(f"{turn['role'][0]}:{turn['content']}" for turn in turns(messages, Limits())) == expected


PARTS = st.sampled_from(["", " ", "x", "yz", None]) | st.lists(st.sampled_from(["p", TEXT]), max_size=2)
MESSAGES = st.builds(Message, role=st.sampled_from(sorted(ROLES.values())), content=PARTS)


@given(st.lists(MESSAGES, max_size=8))
def test_any_conversation_becomes_turns(messages):
    """User and assistant in turn, who spoke last is last, and not a word is lost; refused if there is none."""
    contents = ([m.content] if isinstance(m.content, str) else m.content or [] for m in messages)
    text = "".join("a" if part == TEXT else part for content in contents for part in content)
    if not text.strip():
        with pytest.raises(ApiError, match="empty"):
            turns(messages, Limits())
        return
    result = turns(messages, Limits())
    assert [turn["role"] for turn in result] == [("user", "assistant")[i % 2] for i in range(len(result))]
    assert (result[-1]["role"] == "assistant") == (messages[-1].role == "assistant")
    assert "".join(turn["content"].replace("\n\n", "") for turn in result) == text


def test_an_answer_is_continued(shared, tokenizer):
    """A last message by the assistant is the beginning of its answer."""
    messages = [*USER, {"role": "assistant", "content": "I say"}]
    answer = shared.client.post(CHATS, json={"messages": messages}).json()
    assert spoken(tokenizer, shared.script).endswith("<|assistant_start|>I say")
    assert answer["choices"][0]["message"]["content"] == "Hello there."


# ---------------------------------------------------------------------------------------------------------
# A request of each kind of client, recorded from the client where it runs here, else after its documentation

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": "{}"}}
CLIENTS = [  # name, path, body without model and stream, the last words of the prompt as the model gets it
    ("openai-python", CHATS, {"messages": HI, "temperature": 1.5, "seed": -1, "user": "me", "store": False}, "hi"),
    ("openai-node", CHATS, {"messages": [{"role": "developer", "content": "be brief"}, *HI], "n": 2}, "be brief\n\nhi"),
    ("langchain", CHATS, {"messages": [{"content": [TEXT], "role": "user"}], "max_completion_tokens": 5, "n": 1}, "a"),
    (
        "langchain with tools",
        CHATS,
        {
            "messages": [
                *HI,
                {"content": None, "role": "assistant", "tool_calls": [CALL]},
                {"content": "3", "role": "tool", "tool_call_id": "1"},
            ],
            "tools": [TOOL],
            "temperature": 0.7,
        },
        "3",
    ),
    (
        "langchain, text",
        TEXTS,
        {
            "prompt": ["once"],
            "frequency_penalty": 0,
            "logprobs": None,
            "max_tokens": 256,
            "presence_penalty": 0,
            "seed": None,
            "top_p": 1,
        },
        "once",
    ),
    (
        "litellm",
        CHATS,
        {"messages": HI, "temperature": 0.2, "top_p": 0.9, "stop": ["a"], "max_tokens": 9, "top_k": 5},
        "hi",
    ),
    ("litellm, text", TEXTS, {"prompt": "hi", "max_tokens": 4}, "hi"),
    ("llm", CHATS, {"messages": [{"role": "system", "content": "be brief"}, *HI], "max_tokens": 20}, "be brief\n\nhi"),
    ("llm, text", TEXTS, {"prompt": "once"}, "once"),
    (
        "open-webui",
        CHATS,
        {
            "messages": [{"role": "system", "content": ""}, *HI, {"role": "assistant", "content": ""}, *HI],
            "stop": [],
            "logit_bias": {},
            "max_tokens": None,
        },
        "hi",
    ),
    (
        "open-webui, title of a chat",
        CHATS,
        {"messages": HI, "max_completion_tokens": 1000, "metadata": {"task": "title_generation", "chat_id": "1"}},
        "hi",
    ),
    (
        "librechat",
        CHATS,
        {
            "messages": HI,
            "temperature": 1,
            "top_p": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "user": "65f",
            "stop": None,
        },
        "hi",
    ),
    (
        "continue",
        CHATS,
        {
            "messages": [*HI, {"role": "assistant", "content": "A"}, {"role": "user", "content": [TEXT]}],
            "max_tokens": 4096,
            "stop": ["/src/", "#- coding: utf-8", "```"],
        },
        "a",
    ),
    (
        "continue, autocompletion",
        TEXTS,
        {
            "prompt": "def add(",
            "max_tokens": 4096,
            "temperature": 0.01,
            "stop": [f"<{i}>" for i in range(16)],
            "suffix": "",
            "presence_penalty": None,
        },
        "def add(",
    ),
    (
        "zed",
        CHATS,
        {
            "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": [TEXT]}],
            "stop": [],
            "temperature": 1.0,
            "max_completion_tokens": 8192,
            "parallel_tool_calls": False,
            "tools": [TOOL],
            "tool_choice": "auto",
            "prompt_cache_key": "x",
            "reasoning_effort": None,
        },
        "S\n\na",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "prompt"), [row[1:] for row in CLIENTS], ids=[row[0] for row in CLIENTS])
def test_clients(shared, tokenizer, path, body, prompt, stream):
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    response = shared.client.post(path, json={"model": MODEL.id, "stream": stream, **body, **usage})
    assert response.status_code == 200, response.text
    end = "<|user_end|><|assistant_start|>" if path == CHATS else ""
    assert spoken(tokenizer, shared.script).endswith(("<|user_start|>" if path == CHATS else "<|bos|>") + prompt + end)
    said = tokenizer.decode(
        tokenizer.encode("Hello there.")[: body.get("max_completion_tokens", body.get("max_tokens"))]
    )
    replies = chunks(response) if stream else [response.json()]
    for index in range(body.get("n", 1)):
        mine = [choice for reply in replies for choice in reply["choices"] if choice["index"] == index]
        assert "".join(map(text_of, mine)) == said
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] in ("stop", "length")
    count = replies[-1]["usage"]
    assert count["prompt_tokens"] == len(shared.script.prompts[-1])
    assert count["total_tokens"] == count["prompt_tokens"] + count["completion_tokens"]


def test_what_is_ignored_is_counted(shared):
    before = shared.client.get("/stats").json()["ignored_parameters"].get("banana", 0)
    shared.client.post(CHATS, json={"messages": USER, "banana": 1, "x" * 99: {}}).raise_for_status()
    after = shared.client.get("/stats").json()["ignored_parameters"]
    assert after["banana"] == before + 1
    assert "x" * 60 in after


ASKED_TOO_MUCH = [
    ("response_format", {"type": "json_object"}, "no constrained decoding: only {'type': 'text'}"),
    ("response_format", {"type": "json_schema", "json_schema": {}}, "no constrained decoding"),
    ("tool_choice", "required", "can call no tools .*: only 'none' or 'auto'"),
    ("tool_choice", {"type": "function", "function": {"name": "add"}}, "can call no tools"),
    ("modalities", ["text", "audio"], "generates text only"),
    ("suffix", "after", "does not insert"),
    ("guided_json", {}, "no constrained decoding"),
    ("use_beam_search", True, "has no beam search"),
]


@pytest.mark.parametrize(("name", "value", "message"), ASKED_TOO_MUCH)
def test_what_would_change_the_meaning_is_refused(shared, name, value, message):
    for path, body in ((CHATS, {"messages": USER}), (TEXTS, {"prompt": "hi"})):
        response = shared.client.post(path, json={**body, name: value})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"], error["type"]) == (name, "unsupported_value", "invalid_request_error")
        assert re.search(message, error["message"])
        for neutral in (None, *REFUSED[name][0]):
            assert shared.client.post(path, json={**body, name: neutral}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHATS, {"n": 129}, "n: .* 128, got 129"),
        (CHATS, {"n": 0}, "n: .* 1, got 0"),
        (CHATS, {"n": 100}, "at most 72 answers at once"),
        (CHATS, {"max_completion_tokens": 0}, "max_completion_tokens: expected 1 or more"),
        (CHATS, {"logprobs": 2}, "logprobs: .*boolean"),
        (CHATS, {"top_logprobs": 21}, "top_logprobs: .* 20, got 21"),
        (CHATS, {"stream": "yes"}, "stream: .*boolean"),
        (CHATS, {"model": "\ud800"}, "there is no model"),
        (TEXTS, {}, "prompt: Field required"),
        (TEXTS, {"prompt": []}, "prompt is empty"),
        (TEXTS, {"prompt": [[]]}, "prompt is empty"),
        (TEXTS, {"prompt": [5, 10**6]}, "prompt: expected ids from 0 to 299"),
        (TEXTS, {"prompt": [[-1]]}, "prompt: expected ids from 0 to 299"),
        (TEXTS, {"prompt": 5}, "prompt: "),
        (TEXTS, {"prompt": ["a", [5]]}, "prompt"),
        (TEXTS, {"prompt": "a" * 32_001}, "prompt: at most 32000 characters"),
        (TEXTS, {"prompt": "a" * 5000}, "5001 tokens and this model's context holds 4096"),
        (TEXTS, {"prompt": "a", "best_of": 3}, "best_of must equal n"),
        (TEXTS, {"prompt": "a", "logprobs": 21}, "logprobs: .* 20, got 21"),
    ],
)
def test_refused(shared, path, body, message):
    body = {"messages": USER, **body} if path == CHATS else body
    response = shared.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == (404 if "no model" in message else 400)
    assert re.search(message, response.json()["error"]["message"]), response.text


@pytest.mark.parametrize(("asked", "got"), [(7, 7), (-1, 95), (None, 95), (10**9, 95)])
def test_max_tokens(serve, tokenizer, asked, got):
    """More than fits is what fits; −1 and nothing are what is left of the context."""
    script = Script(tokenizer, "x", endless=True, context=100)
    answer = serve(script).client.post(
        CHATS, json={"messages": [{"role": "user", "content": "y"}], "max_tokens": asked}
    )
    assert answer.json()["usage"]["completion_tokens"] == got
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_settings_reach_the_engine(shared):
    asked = {"temperature": 2, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -2, "frequency_penalty": 1}
    body = {"messages": USER, **asked, "top_p": 0, "top_k": -1, "logit_bias": {"7": -100}, "seed": 3, "n": 2}
    shared.client.post(CHATS, json=body).raise_for_status()
    first, second = shared.script.settings[-2:]
    assert first == asked | {"top_p": 1e-9, "top_k": 0, "logit_bias": {7: -100}, "seed": 3}
    assert second == first | {"seed": row_seed(3, 1)}


# ---------------------------------------------------------------------------------------------------------
# OpenAI's own client


@pytest.fixture
def client(serve):
    with contextlib.ExitStack() as stack:

        def connect(*engines, max_retries=0, **options):
            server = serve(*engines, **options)
            made = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=max_retries, timeout=30)
            return stack.enter_context(made), server

        yield connect


def test_openai_complete(client, tokenizer):
    script = Script(tokenizer)
    openai_client, _ = client(script)
    answer = openai_client.chat.completions.create(model=MODEL.id, messages=USER, seed=-3, temperature=0.5, user="me")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.model == MODEL.id
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello there.")
    produced = len(tokenizer.encode("Hello there.")) + 1
    assert answer.usage.prompt_tokens == len(script.prompts[0])
    assert answer.usage.completion_tokens == produced
    assert answer.usage.total_tokens == len(script.prompts[0]) + produced
    assert script.settings[0]["temperature"] == 0.5
    again = openai_client.chat.completions.create(
        model=MODEL.id, messages=[*USER, choice.message, *USER], max_completion_tokens=2
    )
    assert again.choices[0].finish_reason == "length"
    assert again.usage.completion_tokens == 2


def test_openai_stream(client, tokenizer):
    openai_client, server = client(Script(tokenizer, "é🙂 and more"))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(openai_client.chat.completions.create(model=MODEL.id, messages=USER, **options))
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", MODEL.id)}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "é🙂 and more"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    with openai_client.chat.completions.stream(model=MODEL.id, messages=USER) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "é🙂 and more"
    raw = server.client.post(CHATS, json={"messages": USER, "stream": True}).text
    assert raw.endswith("data: [DONE]\n\n")
    assert '"usage"' not in raw


def test_openai_stream_is_left(client, tokenizer):
    script = Script(tokenizer, "x", endless=True, each=0.002)
    openai_client, server = client(script)
    with openai_client.chat.completions.create(model=MODEL.id, messages=USER, stream=True, max_tokens=4096) as stream:
        next(chunk for chunk in stream if chunk.choices[0].delta.content)  # the first one comes before the job begins
    until(lambda: is_idle(server))
    assert script.closed.is_set()
    assert server.pool.totals["cancelled"] == 1


def test_openai_sees_no_tool_calls(client, tokenizer):
    openai_client, _ = client(tool_script(tokenizer))
    answer = openai_client.chat.completions.create(model=MODEL.id, messages=USER)
    assert answer.choices[0].message.content == "So: It is 42."
    chunks = openai_client.chat.completions.create(model=MODEL.id, messages=USER, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "So: It is 42."


def test_openai_stop(client, tokenizer):
    script = Script(tokenizer, "one two three", endless=True)
    openai_client, _ = client(script)
    for stop, expected in [
        ("two", "one "),
        (["zzz", " thr"], "one two"),
        (["one"], ""),
        (["reeon", "eeo"], "one two thr"),
    ]:
        answer = openai_client.chat.completions.create(model=MODEL.id, messages=USER, stop=stop, max_tokens=200)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
        assert script.closed.is_set()
        stream = openai_client.chat.completions.create(model=MODEL.id, messages=USER, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


@given(st.lists(st.text("ab", min_size=1, max_size=3)), st.lists(st.text("ab", max_size=4), max_size=6))
def test_cut(pieces, stop):
    """Equal to cutting the whole text, however it comes in pieces; without stop strings nothing is held back."""
    text, words = "".join(pieces), [word for word in stop if word]
    ends = [text[:end] for end in range(len(text) + 1) if any(text[:end].endswith(word) for word in words)]
    expected = min((ends[0].removesuffix(word) for word in words if ends[0].endswith(word)), key=len) if ends else text
    cut, got = Cut(stop), []
    while pieces and not cut.done:
        got.append(cut.push(pieces.pop(0)))
    assert "".join([*got, cut.close()]) == expected
    assert cut.done == bool(ends)
    if not words:
        assert "".join(got) == text


def test_openai_errors(client, tokenizer):
    go = threading.Event()
    openai_client, server = client(Script(tokenizer, go=go, context=20), queue_size=0, batch_size=1)
    create = openai_client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=MODEL.id, messages=[{"role": "user", "content": "y" * 50}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "54 tokens" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=MODEL.id, messages=USER, n=2)
    assert "at most 1 answers at once" in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="gpt-4o", messages=USER)
    assert caught.value.code == "model_not_found"
    assert MODEL.id in caught.value.message
    with send_raw(server, chat()):
        until(lambda: not is_idle(server))
        with pytest.raises(openai.APIStatusError) as caught:
            create(model=MODEL.id, messages=USER)
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
        go.set()
        until(lambda: is_idle(server))
    assert create(model=MODEL.id, messages=USER).choices[0].message.content == "Hello there."


def test_openai_client_tries_again(client, tokenizer):
    """A busy server's Retry-After is understood: the client comes back by itself and is served."""
    go = threading.Event()
    openai_client, server = client(Script(tokenizer, go=go), queue_size=0, batch_size=1, max_retries=2)
    with send_raw(server, chat()):
        until(lambda: not is_idle(server))
        thread, results = in_background(openai_client.chat.completions.create, model=MODEL.id, messages=USER)
        until(lambda: server.pool.totals["rejected"] == 1)
        go.set()
        thread.join(30)
    assert results[0].choices[0].message.content == "Hello there."


def test_openai_error_in_a_stream(client, tokenizer):
    openai_client, _ = client(Script(tokenizer, fault=RuntimeError("broken"), fault_at=2))
    stream = openai_client.chat.completions.create(model=MODEL.id, messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="the model failed on this request"):
        list(stream)


def test_openai_responses(client, tokenizer):
    """The newer API, for text: whole and as events; what it would have to remember is refused."""
    openai_client, _ = client(script := Script(tokenizer))
    create = openai_client.responses.create
    whole = create(model=MODEL.id, input="hi", instructions="Be brief.", tools=[])
    assert spoken(tokenizer, script).endswith("<|user_start|>Be brief.\n\nhi<|user_end|><|assistant_start|>")
    assert (whole.output_text, whole.status, whole.error) == ("Hello there.", "completed", None)
    assert whole.usage.input_tokens == len(script.prompts[-1])
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    cut = create(model=MODEL.id, input=[*parts, *whole.output, *USER], max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert len(script.prompts[-1]) > len(script.prompts[-2])
    chunks = list(create(model=MODEL.id, input=parts, stream=True))
    assert [chunk.sequence_number for chunk in chunks] == list(range(len(chunks)))
    assert "".join(chunk.delta for chunk in chunks if chunk.type == "response.output_text.delta") == "Hello there."
    assert (chunks[0].type, chunks[-1].type) == ("response.created", "response.completed")
    assert chunks[-1].response.output_text == "Hello there."
    with openai_client.responses.stream(model=MODEL.id, input="hi") as stream:
        assert stream.until_done().get_final_response().output_text == "Hello there."
    for refused in ({"previous_response_id": "resp_1"}, {"text": {"format": {"type": "json_object"}}}):
        with pytest.raises(openai.BadRequestError):
            create(model=MODEL.id, input="hi", **refused)
    script.fault = RuntimeError("broken")
    *_, last = create(model=MODEL.id, input="hi", stream=True)
    assert (last.type, last.message) == ("error", "the model failed on this request")
    with pytest.raises(openai.InternalServerError):
        create(model=MODEL.id, input="hi")


def test_openai_models(client, tokenizer):
    openai_client, _ = client(Script(tokenizer))
    assert [(model.id, model.object) for model in openai_client.models.list()] == [(MODEL.id, "model")]
    assert openai_client.models.retrieve(MODEL.id).owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("other")


# ---------------------------------------------------------------------------------------------------------
# Probabilities


def reference(engine, ids):
    """Log probabilities [T - 1, V] of what comes after each id."""
    with torch.inference_mode():
        return engine.model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)


def test_score(engine):
    """Of each token given those before it, in pieces as in one; the first has none."""
    ids = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    (*parts, tokens), expected = score_prompt(engine, ids, 3), reference(engine, ids)
    assert parts == [None] * 3
    assert [token.id for token in tokens] == ids
    assert (tokens[0].logprob, tokens[0].top) == (None, [])
    for token, row in zip(tokens[1:], expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert [row[id].item() for id, _ in token.top] == pytest.approx([value for _, value in token.top], abs=1e-4)


def ask(server, path, stream, **body):
    """(text, logprobs of a choice) of a reply, in one piece or put together from a stream."""
    response = server.client.post(path, json={"stream": stream, **body})
    choices = [reply["choices"][0] for reply in (chunks(response) if stream else [response.json()])]
    found = {}
    for choice in choices:
        for name, values in (choice["logprobs"] or {}).items():
            found[name] = found.get(name, []) + (values or [])
    return "".join(map(text_of, choices)), found


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_an_answer(serve, engine, tokenizer, stream):
    no_special = {str(tokenizer.encode_special(name)): -100 for name in tokenizer.get_special_tokens()}
    options = {"max_tokens": 12, "seed": 1, "logit_bias": no_special, "logprobs": True, "top_logprobs": 2}
    text, found = ask(serve(engine), CHATS, stream, messages=USER, **options)
    raw = [bytes(entry["bytes"]) for entry in found["content"]]
    assert b"".join(raw).decode(errors="replace") == text
    prompt = tokenizer.render_for_completion({"messages": USER})
    ids = [next(i for i in range(300) if tokenizer.id_to_bytes(i) == piece) for piece in raw]
    expected = reference(engine, [*prompt, *ids])[len(prompt) - 1 :]
    for entry, row, id in zip(found["content"], expected, ids, strict=True):
        assert entry["logprob"] == pytest.approx(row[id].item(), abs=1e-3)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_echo(serve, engine, tokenizer, stream, as_ids, max_tokens):
    """The prompt comes back with the probability of each token; <|bos|>, where it was put before it, does not."""
    text = "héllo ∀"
    ids = tokenizer.encode(text)
    options = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "seed": 1}
    whole, found = ask(serve(engine), TEXTS, stream, prompt=ids if as_ids else text, **options)
    assert whole.startswith(text)
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert found["text_offset"][: len(ids)] == [
        len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))
    ]
    assert found["text_offset"] == sorted(found["text_offset"])
    assert "bytes:\\xc3" in found["tokens"]
    before = [] if as_ids else [tokenizer.get_bos_token_id()]
    expected = [row[id].item() for row, id in zip(reference(engine, before + ids), (before + ids)[1:], strict=True)]
    assert found["token_logprobs"][: len(ids)] == [None] * as_ids + [pytest.approx(x, abs=1e-4) for x in expected]
    for value, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert value is top is None or value <= max(top.values())


def test_several_prompts(shared, tokenizer):
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "echo": True}
    answer = shared.client.post(TEXTS, json=body).json()
    said = tokenizer.decode(tokenizer.encode("Hello there.")[:3])
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == list(enumerate([f"one{said}", f"one{said}", f"two{said}", f"two{said}"]))
    prompt = sum(len(tokenizer.encode(text)) + 1 for text in ("one", "two"))
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert answer["object"] == "text_completion"
    assert len(set(s["seed"] for s in shared.script.settings[-4:])) == 4


@pytest.mark.parametrize(("stop", "text", "count"), [([], "abcd", 5), (["cd"], "ab", 2), (["dx"], "abcd", 5)])
def test_tokens_of_an_answer_that_is_cut(tokenizer, stop, text, count):
    """Those whose text is shown, and no others; the end token is told of when the answer ends by itself."""
    ids = [*tokenizer.encode("abcd"), tokenizer.encode_special("<|assistant_end|>")]

    async def pieces():
        job = Job([1], 99, stop=stop, logprobs=0)
        answer = Answer(job, tokenizer, 0)
        assert [answer.take(id, -1.0) for id in ids][-1] == "stop"
        await asyncio.sleep(0)
        return [job.events.get_nowait()[1] for _ in range(job.events.qsize())]

    made = asyncio.run(pieces())
    assert "".join(piece.text for piece in made) == text
    assert [(token.id, token.offset) for piece in made for token in piece.tokens] == list(
        zip(ids, range(count), strict=False)
    )


# ---------------------------------------------------------------------------------------------------------
# Programs that others wrote


def test_schemathesis(serve, tokenizer):
    """What /openapi.json says may be sent, and what it says may not: nothing of it is the server's fault."""
    server = serve(Script(tokenizer), queue_size=100)
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        CHATS,
        TEXTS,
        "/v1/responses",
        "/v1/models",
        "/chat/completions",
    }

    for operation in operations:

        @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE) | operation.as_strategy()
        )
        def holds(case):
            response = case.call(base_url=server.url, timeout=30)
            assert response.status_code < 500, response.text
            assert response.status_code < 400 or response.json()["error"]["message"]

        holds()
    until(lambda: is_idle(server))
    assert totals(server)["failed"] == 0


NODE = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.argv[2], apiKey: "s3cret", maxRetries: 0});
const [model] = (await client.models.list()).data;
const messages = [{role: "user", content: "hi"}];
const options = {model: model.id, messages, temperature: 0.5, stop: ["zz"], n: 2};
const whole = await client.chat.completions.create(options);
let said = "", usage;
const streamed = {...options, n: 1, stream: true, stream_options: {include_usage: true}};
for await (const chunk of await client.chat.completions.create(streamed)) {
  said += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const final = await client.chat.completions.stream({model: model.id, messages}).finalContent();
const text = await client.completions.create({model: model.id, prompt: "a", echo: true, max_tokens: 0});
const wrong = await client.embeddings.create({model: model.id, input: "a"}).catch((error) => error);
console.log(JSON.stringify([whole.choices.map((choice) => choice.message.content), said, usage.total_tokens > 0, final,
  text.choices[0].text, wrong.status, wrong.message]));
"""


def test_openai_node(serve, tokenizer, tmp_path):
    """The client for JavaScript, from $OPENAI_NODE, a folder where `npm install openai` was done."""
    folder = os.environ.get("OPENAI_NODE")
    if not (folder and shutil.which("node")):
        pytest.skip("needs node, and OPENAI_NODE=FOLDER with openai in it")
    (tmp_path / "node_modules").symlink_to(Path(folder) / "node_modules")
    (tmp_path / "client.mjs").write_text(NODE)
    server = serve(Script(tokenizer), api_key="s3cret")
    command = ["node", tmp_path / "client.mjs", f"{server.url}/v1"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert output.returncode == 0, output.stderr
    *said, status, message = json.loads(output.stdout)
    assert said == [["Hello there."] * 2, "Hello there.", True, "Hello there.", "a"]
    assert status == 404
    assert "POST /v1/embeddings does not exist" in message
