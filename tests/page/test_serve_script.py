"""serve.py as a program: its end at SIGTERM, its errors; the released checkpoints; OpenAI's client."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import time

import pytest
from scripts import start
from starlette.testclient import TestClient
from test_server import HOST, check_error, client_of, complete, new_service

import serve
from src.checkpoint import load_model
from src.errors import UserError
from src.page import running
from src.page.app import create_app
from src.page.config import ServeConfig
from src.page.service import example_prompt, open_service


@pytest.fixture(scope="module")
def program():
    """(serve.py in a process of its own, its port)."""
    words = ("--port", 0, "--puzzle", "none", "--grace_seconds", "0.3", "--body_seconds", "0.5", "--device", "cpu")
    child = start("serve.py", *words)
    try:
        lines = iter(child.stderr.readline, "")
        line = next(line for line in lines if "Ctrl-C ends it" in line)
        yield child, int(re.fullmatch(r"python: http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", line)[1])
    finally:
        child.kill()


@pytest.fixture(scope="module")
def released():
    """A client of the released checkpoints."""
    with TestClient(create_app(open_service(ServeConfig(device="cpu"))), HOST) as client:
        yield client


def exchange(port, *parts, reads=True) -> bytes:
    """Sends bytes and returns all that the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while reads and (part := connection.recv(2**16)):
            answer += part
        return answer


def test_rude_clients_disturb_nobody(program):
    """Half headers, half bodies, huge headers, pipelined requests, no HTTP at all, a reader that does not read."""
    child, port = program
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    assert exchange(port, b"GET /health HTTP/1.1\r\nHost: loc") == b""  # closed after --body_seconds
    answer = exchange(port, head + b'100\r\n\r\n{"prompt": ')
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body was not complete after 0.5 s" in answer
    with contextlib.suppress(ConnectionError):  # the server may close before everything is sent
        answer = exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 2_000_000)
        assert answer.startswith(b"HTTP/1.1 400 ")
    assert exchange(port, b"\x16\x03\x01\x00 no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    answers = exchange(port, 3 * (get + b"\r\n") + get + b"Connection: close\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200 ") == answers.count(b'"id":"python"') == 4
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", port)) as lazy:
        lazy.sendall(head + b"%d\r\n\r\n" % len(body) + body)
        body = b'{"prompt": "a", "max_tokens": 2}'
        answer = exchange(port, head + b"%d\r\nConnection: close\r\n\r\n" % len(body) + body)
        assert b'"completion_tokens":2' in answer
    body = b'{"prompt": "a", "max_tokens": 4000, "ignore_eos": true}'
    with socket.create_connection(("127.0.0.1", port)) as hasty:  # sends more, and goes before the answer
        hasty.sendall(head + b"%d\r\n\r\n" % len(body) + body)
        time.sleep(0.1)
        hasty.sendall(b"\r\n")
    for _ in range(200):
        answer = exchange(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        if b'"running":0,"waiting":0' in answer:
            break
        time.sleep(0.02)
    else:
        pytest.fail(f"the row of a closed connection is not free: {answer}")
    assert child.poll() is None


def test_sigterm_ends_a_stream_cleanly(program):
    child, port = program
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "def ", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = client.getresponse()
    first = answer.readline()
    child.send_signal(signal.SIGTERM)
    *lines, done = [line for line in answer.read().decode().split("\n\n") if line]
    assert first.startswith(b"data: {") and done == "data: [DONE]"
    ended = json.loads(lines[-1].removeprefix("data: "))["choices"][0]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("length", "shutdown")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0 and err == ""


def test_an_address_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^cannot listen on 127.0.0.1, port {port} \(Address already in use\): choose"
        ):
            serve.main(["--port", str(port)])


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    """A transport that is closed waits until the client has read everything, which may be never."""
    monkeypatch.setattr(running, "LAST_S", 0.05)

    class Transport:
        closing, aborted = False, 0

        def is_closing(self):
            return self.closing

        def abort(self):
            self.aborted += 1

    async def watch():
        protocol = object.__new__(running._Protocol)
        protocol.transport = Transport()
        protocol._look(False)
        await asyncio.sleep(0.3)
        assert not protocol.transport.aborted  # an open connection may be quiet for long
        protocol.transport.closing = True
        await asyncio.sleep(0.3)
        assert protocol.transport.aborted == 1

    asyncio.run(watch())


def test_a_name_that_cannot_be_a_host():
    with pytest.raises(UserError, match=r"^cannot listen on a\.\.b, port 0 \(.*\): choose another --port or --host"):
        running.listen("a..b", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port is 70000: set it from 0 to 65,535"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"api_key": "two words"}, "api_key must be"),
        ({"onnx": "x", "checkpoint": "y"}, "--onnx has its own weights"),
        ({"allowed_hosts": ["http://x"]}, "allowed_hosts has 'http://x'"),
        ({"name": "a b"}, "name is 'a b'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match="^" + message):
        ServeConfig(**settings)


def test_a_board_is_solved(released):
    board = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    card = released.get("/v1/model_card").json()["puzzle"]
    assert card.pop("parameters") > 500_000
    assert card == {
        "name": "sudoku",
        "family": "trm",
        "kind": "sudoku9",
        "rows": 9,
        "columns": 9,
        "symbols": list(".123456789"),
        "steps": 16,
        "max_steps": 128,
    }
    answer = released.post("/v1/puzzle", json={"board": board, "steps": 3}).json()
    assert answer["solved"] is True and answer["message"].startswith("right from step")
    assert [len(step["board"]) for step in answer["steps"]] == [81] * 3
    assert all(len(step["certainty"]) == 81 and 0 <= step["halt"] <= 1 for step in answer["steps"])
    answer = released.post("/v1/puzzle", json={"board": board, "exit": "halt"}).json()
    assert answer["solved"] and len(answer["steps"]) < 16
    check_error(
        released.post("/v1/puzzle", json={"board": "12"}), 400, "the board: a sudoku9 board has 81 cells", "board"
    )
    answer = released.post("/v1/puzzle", json={"board": "55" + board[2:]})
    check_error(answer, 400, "the board cannot be solved: row 1 has 5 twice", "board")
    two = "534..8912672195348198342567859..1423426853791713924856961537284287419635345286179"  # 6 and 7, or 7 and 6
    answer = released.post("/v1/puzzle", json={"board": two, "steps": 1}).json()
    assert answer["message"].endswith("; the board has several solutions, and any of them counts as right")
    hopeless = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    answer = released.post("/v1/puzzle", json={"board": hopeless, "steps": 1}).json()
    assert answer["message"].endswith("; it is not known whether the board has a solution") and not answer["solved"]


def test_the_example_of_a_run(tmp_path):
    checkpoint, config = tmp_path / "best", tmp_path / "config.yaml"
    assert example_prompt(checkpoint) is None  # not a run
    config.write_text("records: false\nsample_prompt: Once\n")
    assert example_prompt(checkpoint) == "Once"
    config.write_text('records: true\nsample_prompt: ""\n')
    assert example_prompt(checkpoint) is None  # no samples yet
    (tmp_path / "samples.txt").write_text(
        "=== step 5: a\nInput: 1+2 \n Output: 3\n=== step 9: b\nInput: 1+2 \n Output:"
    )
    assert example_prompt(checkpoint) == "Input: 1+2 \n Output:"
    config.write_text("records: false\n")
    assert example_prompt(checkpoint) is None


def test_the_released_model_answers_as_generate_py(released):
    answer = complete(released, prompt="def main(", max_tokens=12, seed=1, temperature=0.8, top_p=0.95)
    lm = load_model()
    assert "def main(" + answer["choices"][0]["text"] == lm.write("def main(", 12, seed=1)


@pytest.mark.slow  # importing the client takes seconds
def test_openais_client():
    import openai

    service = new_service(api_key="sesame")
    with client_of(service) as http_client:
        client = openai.OpenAI(base_url=f"{HOST}/v1", api_key="sesame", http_client=http_client, max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        options = {"model": "tiny", "max_tokens": 10, "seed": 1}
        whole = client.completions.create(prompt="ab", logprobs=1, echo=True, **options)
        chunks = list(client.completions.create(prompt="ab", stream=True, **options))
        assert "ab" + "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens) - 3
        messages = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=1, **options)
        assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
        text = ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **options):
            text += chunk.choices[0].delta.content or ""
        assert text == chat.choices[0].message.content
        extra = {"recursion": {"depth": 3, "trace": 2}}
        seen = client.completions.create(prompt="ab", extra_body=extra, **options).choices[0].recursion
        assert {token["steps"] for token in seen["tokens"]} == {3}
        with pytest.raises(openai.BadRequestError, match="set it from 0 to 4096"):
            client.completions.create(prompt="ab", model="tiny", max_tokens=10**7)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(prompt="ab", model="gpt")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
