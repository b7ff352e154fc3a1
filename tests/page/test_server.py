"""The API of serve.py, called in this process: answers, streams, errors, bounds, and who may ask."""

import asyncio
import json

import jsonschema
import pytest
import torch
from conftest import build
from starlette.testclient import TestClient
from trainers import puzzle_model

from src.checkpoint import save_checkpoint
from src.evaluation.scoring import score_continuations
from src.language_model import LanguageModel
from src.page import schemas
from src.page.answers import event
from src.page.app import create_app
from src.page.asked import read_rule
from src.page.config import ServeConfig
from src.page.engine import Text
from src.page.errors import Busy
from src.page.puzzles import PuzzleSolver
from src.page.schemas import validate
from src.page.service import Service
from src.page.writing import Writer
from src.sampling import generate_ids
from src.tasks.puzzle_data import PuzzleForm
from src.tasks.puzzle_folder import kind_named
from src.tokenizer import ByteLevelTokenizer

HOST = "http://127.0.0.1:8000"
TOKENIZER = ByteLevelTokenizer()


def new_service(**settings) -> Service:
    model = build(vocab_size=TOKENIZER.vocab_size, max_seq_len=64, n_layers=1)
    return Service(model, TOKENIZER, ServeConfig(**settings), "tiny")


def client_of(service, **options) -> TestClient:
    return TestClient(create_app(service), HOST, **options)


@pytest.fixture(scope="module")
def service():
    return new_service(max_body_kib=64, max_n=4, max_tokens=200)


@pytest.fixture(scope="module")
def client(service):
    with client_of(service) as client:
        yield client


def complete(client, **body):
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(answer) -> list[dict]:
    """Returns the chunks of a stream, whose last event is [DONE]."""
    *lines, done, end = answer.text.split("\n\n")
    assert done == "data: [DONE]" and end == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_text_is_that_of_generate_py(client, service):
    answer = complete(client, prompt="def ", max_tokens=20, seed=5, temperature=0.8, top_p=0.95)
    (choice,) = answer["choices"]
    lm = LanguageModel(service.model, TOKENIZER)
    assert "def " + choice["text"] == lm.write("def ", 20, seed=5)
    assert choice["finish_reason"] in ("length", "stop") and choice["logprobs"] is None
    made = answer["usage"]["completion_tokens"]
    depth = service.model.config.recursion_steps
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": made,
        "total_tokens": 5 + made,
        "recursion_steps": depth * made,
    }
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")


def test_choices_have_the_seeds_of_generate(client, service):
    """Choice i of a prompt is row i of `generate`; other prompts beside it change nothing."""
    body = {"max_tokens": 8, "seed": 3, "ignore_eos": True, "recursion": {}}
    answer = complete(client, prompt=["ab", "cd"], n=2, **body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    found = [[token["id"] for token in choice["recursion"]["tokens"]] for choice in answer["choices"]]
    for prompt, rows in (("ab", found[:2]), ("cd", found[2:])):
        ids = torch.tensor([TOKENIZER.encode(prompt, bos=True)] * 2)
        assert rows == generate_ids(service.model, ids, 8, seed=3)[:, 3:].tolist()
    as_ids = complete(client, prompt=[[257, 97, 98], [257, 99, 100]], n=2, **body)
    assert [c["text"] for c in as_ids["choices"]] == [c["text"] for c in answer["choices"]]


def test_token_ids_may_be_written_as_fractions(client):
    """Many programs write 257 as 257.0. Such a prompt must not make the model fail, with the texts of other clients."""
    body = {"max_tokens": 4, "seed": 3}
    found = [complete(client, prompt=ids, **body)["choices"][0]["text"] for ids in ([257, 97], [257.0, 97.0])]
    assert found[0] == found[1]


def test_without_a_seed_equal_prompts_get_different_texts(client):
    texts = [c["text"] for c in complete(client, prompt=["ab"] * 4, max_tokens=8, ignore_eos=True)["choices"]]
    assert len(set(texts)) == 4
    seeded = complete(client, prompt=["ab"] * 4, max_tokens=8, ignore_eos=True, seed=1)["choices"]
    assert len({c["text"] for c in seeded}) == 1


def test_a_default_above_a_bound_is_lowered_to_it():
    with client_of(new_service(max_tokens=5)) as client:
        assert complete(client, prompt="a", ignore_eos=True)["usage"]["completion_tokens"] == 5
        body = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
        assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 5
        assert client.get("/v1/model_card").json()["max_tokens"] == 5


def test_a_depth_for_which_the_cache_has_no_room_is_refused():
    service = new_service(max_cache_gib=0.001)
    assert service.engine.limits.cache_rows < 64 / service.model.config.recursion_steps
    with client_of(service) as client:
        answer = client.post("/v1/completions", json={"prompt": "a", "recursion": {"depth": 64}})
        check_error(answer, 400, "recursion.depth is 64, for which max_cache_gib has no room: lower it", "recursion")
        assert complete(client, prompt="a", max_tokens=2)["choices"][0]["finish_reason"]


def test_line_ends_of_unicode_are_escaped_in_a_stream():
    """Some clients split an event where `str.splitlines` would."""
    text = "a\u2028b\u2029c\x85d"
    line = event({"text": text})
    assert len(line.splitlines()) == 2 and json.loads(line.removeprefix("data: ")) == {"text": text}


def test_a_stream_is_the_same_text_in_pieces(client):
    body = {"prompt": "é", "n": 2, "max_tokens": 30, "seed": 1, "temperature": 0.7, "logprobs": 2}
    body |= {"recursion": {"trace": 1, "depth": 3}, "echo": True, "stop": ["\x00", "zz"]}
    whole = complete(client, **body)
    answer = client.post("/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"] and choice["text"].startswith("é")
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert sum((c["logprobs"][name] for c in mine), []) == choice["logprobs"][name]
        assert sum((c["recursion"]["tokens"] for c in mine), []) == choice["recursion"]["tokens"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"] is not None
        for token in choice["recursion"]["tokens"]:
            assert set(token) == {"id", "text", "bytes", "steps", "p", "trace"}
            assert token["steps"] == len(token["trace"]) == 3
            assert set(token["trace"][0]) == {"halt", "entropy", "p", "top"} and len(token["trace"][0]["top"][0]) == 3
        tokens = choice["recursion"]["tokens"]
        assert choice["text"] == "é" + "".join(token["text"] for token in tokens)


def test_logprobs_name_half_characters(client):
    answer = complete(client, prompt="aé", max_tokens=0, echo=True, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<bos>", "a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 0, 1, 1]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert answer["choices"][0]["text"] == "aé" and answer["choices"][0]["finish_reason"] == "length"


def test_echoed_logprobs_are_those_of_eval_lm(client, service):
    """What the lm-evaluation-harness asks `local-completions` for: token ids, one more token, which it then ignores."""
    prompts = [TOKENIZER.encode(text, bos=True) for text in ("To be, or", "not to be", "x" * 63)]
    answer = complete(client, prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234)
    expected = score_continuations(service.model, [(ids[:3], ids[3:]) for ids in prompts])
    for choice, ids, score in zip(answer["choices"], prompts, expected, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + 1
        assert sum(logprobs["token_logprobs"][3:-1]) == pytest.approx(score.logprob, abs=1e-3)
        pairs = zip(logprobs["token_logprobs"][3:-1], logprobs["top_logprobs"][3:-1])
        assert all(own == max(top.values()) for own, top in pairs) == score.is_greedy


def test_chat(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    body = {"messages": messages, "max_tokens": 6, "seed": 2, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    same = complete(client, prompt="System: Be brief.\nUser: hi\nAssistant:", max_tokens=6, seed=2)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": same["choices"][0]["text"]}
    assert len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2 and answer["object"] == "chat.completion"
    chunks = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == choice["message"]["content"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert ["role" in c["choices"][0]["delta"] for c in chunks] == [True] + [False] * (len(chunks) - 1)


def test_facts(client, service):
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    card = client.get("/v1/model_card").json()
    assert card["family"] == "trm" and card["exits"] == ["halt", "kl"] and card["context"] == 64
    assert card["parameters"] == sum(p.numel() for p in service.model.parameters())
    assert card["backend"] == "torch" and card["puzzle"] is None and card["fim"] is False
    assert card["start"] == [TOKENIZER.bos_id] and (card["least_depth"], card["depth"]) == (1, 2)
    assert client.post("/v1/tokenize", json={"text": "a", "inside": True}).json()["tokens"][0]["id"] == 97
    tokens = client.post("/v1/tokenize", json={"text": "aé"}).json()["tokens"]
    assert [token["text"] for token in tokens] == ["a", "", "é"]
    assert [token["bytes"] for token in tokens] == [[97], [0xC3], [0xA9]]
    assert 'trm_status_total{code="200"}' in client.get("/metrics").text


# ---- errors ---------------------------------------------------------------------------------------------------------

LONG = "the prompt has 65 tokens, the context holds 64: shorten it"
REFUSED = [
    ({}, "prompt", "prompt is missing: give it"),
    ({"prompt": "a", "promt": 1}, "promt", "there is no setting promt: did you mean prompt?"),
    ({"prompt": 5}, "prompt", "prompt is a whole number: give it a string or a list"),
    ({"prompt": ["a", 5]}, "prompt", "prompt[1] is a whole number: give it a string"),
    ({"prompt": [[1], [2, "a"]]}, "prompt", "prompt[1][1] is a string: give it a whole number"),
    ({"prompt": [1, 259]}, "prompt", "prompt[1] is 259: set it from 0 to 258"),
    ({"prompt": []}, "prompt", "prompt has 0 items: give it 1 or more"),
    ({"prompt": "x" * 64}, "prompt", LONG),
    ({"prompt": "x" * 5000}, "prompt", "prompt has 5,000 characters: give it 4,096 or fewer"),
    ({"prompt": "a", "n": 5}, "n", "n is 5: set it from 1 to 4"),
    ({"prompt": "a", "n": True}, "n", "n is true or false: give it a whole number"),
    ({"prompt": "a", "max_tokens": 201}, "max_tokens", "max_tokens is 201: set it from 0 to 200"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "max_tokens is a number: give it a whole number"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens is 0, which needs echo: set it to 1 or more"),
    ({"prompt": "a", "stop": ""}, "stop", "stop has 0 characters: give it 1 or more"),
    ({"prompt": "a", "stop": ["b", 1]}, "stop", "stop[1] is a whole number: give it a string"),
    ({"prompt": "a", "top_p": 0}, "top_p", "top_p is 0: set it from 1e-09 to 1"),
    ({"prompt": "a", "temperature": -1}, "temperature", "temperature is -1: set it from 0 to 1000000.0"),
    ({"prompt": "a", "seed": -1}, "seed", "seed is -1: set it from 0 to 9223372036854775807"),
    ({"prompt": "a", "model": "gpt"}, "model", "there is no model 'gpt' here: use 'tiny'"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "a suffix needs a model that was trained with --fim_rate"),
    ({"prompt": "a", "best_of": 2}, "best_of", "best_of is not supported: leave it out"),
    ({"prompt": "a", "recursion": {"depth": 65}}, "recursion", "recursion.depth is 65: set it from 1 to 64"),
    (
        {"prompt": "a", "recursion": {"exit": "x"}},
        "recursion",
        'recursion.exit is "x": choose one of null, "halt", "kl"',
    ),
    ({"prompt": "a", "recursion": {"threshold": 1}}, "recursion", "recursion: recursion.threshold belongs to an exit"),
    ({"prompt": "a", "recursion": {"exit": "halt", "threshold": 2}}, "recursion", "recursion: act_threshold is 2.0"),
    ({"prompt": "a\ud800"}, "prompt", "prompt has an escape for half a character, such as \\ud800: remove it"),
]


def check_error(answer, status, message, param=None):
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith(message) and error["param"] == param, error
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(("body", "param", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_is_refused(client, body, param, message):
    answer = client.post("/v1/completions", content=json.dumps(body))
    check_error(answer, 404 if param == "model" else 400, message, param)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff{}", "the body is not JSON"),
        (b"[1]", "the body is a list, not a JSON object: send one"),
        (b'{"prompt": NaN}', "the body is not JSON (NaN is no JSON number)"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"prompt": ' + b"[" * 30 + b"]" * 30 + b"}", "the body nests over 20 lists and objects: flatten it"),
        (b"[" * 50000, "the body nests over 20 lists and objects: flatten it"),
        (b'{"\\ud800": 1}', "a name has an escape for half a character, such as \\ud800: remove it"),
        (b'{"a": [{"\\ud800": 1}]}', "a name has an escape for half a character, such as \\ud800: remove it"),
    ],
    ids=["empty", "half", "not UTF-8", "a list", "NaN", "a huge number", "deep", "very deep", "a name", "a deep name"],
)
def test_broken_bodies(client, data, message):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/tokenize"):
        check_error(client.post(path, content=data), 400, message)


def test_other_errors(client):
    check_error(client.post("/v1/completions", content=b" " * 70_000), 413, "the body has more than 64 KiB: send less")
    check_error(client.get("/v1/nothing"), 404, "there is nothing at /v1/nothing")
    check_error(client.get("/v1/completions"), 405, "GET is not for /v1/completions")
    check_error(client.get("/v1/models/gpt"), 404, "there is no model 'gpt' here", "model")
    check_error(client.post("/v1/puzzle", json={"board": "1"}), 404, "no puzzle model is served")
    body = {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}
    check_error(client.post("/v1/chat/completions", json=body), 400, "top_logprobs needs logprobs", "top_logprobs")
    body = {"messages": [{"role": "robot", "content": "a"}]}
    check_error(client.post("/v1/chat/completions", json=body), 400, "messages[0].role is", "messages")


def test_a_failure_of_the_model_reaches_the_client_as_an_error(capsys):
    service = new_service()
    service.model.forward = None  # whatever calls it fails
    with client_of(service) as client:
        check_error(client.post("/v1/completions", json={"prompt": "a"}), 500, "the model failed: ")
        answer = client.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert "the model failed" in events(answer)[-1]["error"]["message"]
        assert client.get("/health").status_code == 200
    assert "Traceback" in capsys.readouterr().err and "Traceback" not in answer.text


# ---- who may ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "192.168.1.7:8000"}, 200),
        ({"Host": "my-machine.local:1"}, 200),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:8000@evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": HOST}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
    ids=str,
)
def test_other_sites_are_refused(headers, status):
    client = client_of(new_service(allowed_hosts=["My-Machine.local"]))
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] in ("wrong_host", "wrong_origin")


def test_every_answer_has_the_headers_of_safety(client):
    for path in ("/", "/v1/models", "/nothing", "/static/nothing.js"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_a_key_is_asked_for():
    client = client_of(new_service(api_key="sesame"))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sésame".encode("latin-1")}):
        answer = client.get("/v1/models", headers=headers)
        assert check_error(answer, 401, "the API key is missing or wrong")["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
    assert client.get("/metrics").status_code == 401 and client.get("/health").status_code == 503  # no engine yet


# ---- the queue, and clients that go away ----------------------------------------------------------------------------


def long_text() -> Text:
    ids = [TOKENIZER.bos_id]
    text = Text(ids, (0.0, None, None), writer=Writer(TOKENIZER, ids, (), (), 10**6))
    text.tag = asyncio.Queue()
    return text


def test_more_texts_than_the_queue_holds_are_refused_before_they_are_made(monkeypatch):
    service = new_service(max_queue=3)
    with client_of(service) as client:
        monkeypatch.setattr("src.page.asked.Text", lambda *args, **options: pytest.fail("a text was made"))
        answer = client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2})
        check_error(answer, 400, "the request asks for 4 texts, the queue holds 3: ask for fewer", "n")


def test_the_trained_depth_is_one_rule_however_it_is_asked_for(service):
    rules = [read_rule(asked, service.model) for asked in (None, {"depth": 2}, {"depth": None}, {"depth": 3})]
    assert rules[0] == rules[1] == rules[2] != rules[3]


def test_a_bound_below_the_trained_depth_allows_it():
    assert new_service(max_depth=1).card()["max_depth"] == 2


@pytest.mark.parametrize("family", ["trm", "loop", "none"])
def test_a_puzzle_model_of_any_family_solves_boards(family, tmp_path):
    kind = kind_named("sudoku4")
    save_checkpoint(tmp_path / "m", puzzle_model(kind, recursion=family, halting=False), PuzzleForm(kind))
    puzzle = PuzzleSolver(tmp_path / "m")
    model = build(vocab_size=TOKENIZER.vocab_size, max_seq_len=64, n_layers=1)
    with client_of(Service(model, TOKENIZER, ServeConfig(), "tiny", puzzle)) as client:
        card = client.get("/v1/model_card").json()["puzzle"]
        assert (card["steps"], card["max_steps"]) == ((5, 128) if family == "trm" else (1, 1))
        for steps in (None, card["steps"]):
            answer = client.post("/v1/puzzle", json={"board": "3....2....4..1.."} | ({"steps": steps} if steps else {}))
            assert answer.status_code == 200 and len(answer.json()["steps"]) == card["steps"], answer.text


def test_a_full_queue_answers_429():
    service = new_service(max_rows=1, max_queue=1)
    with client_of(service) as client:
        texts = [long_text(), long_text()]
        service.engine.submit(texts)
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert check_error(answer, 429, "all 1 places of the queue are taken: try again in ")["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        check_error(
            client.post("/v1/completions", json={"prompt": "a", "n": 2}), 400, "the request asks for 2 texts", "n"
        )
        service.engine.cancel(texts)
        assert complete(client, prompt="a")["choices"]


def test_a_text_that_leaves_the_queue_frees_no_place_before_it_has_a_row(monkeypatch):
    engine = new_service(max_rows=1, max_queue=1).engine
    begin, groups = engine._begin, []

    def begin_late(group):
        with pytest.raises(Busy):
            engine.submit([long_text()])
        groups.append(len(group))
        begin(group)

    monkeypatch.setattr(engine, "_begin", begin_late)
    monkeypatch.setattr(engine, "post", lambda pieces: None)
    engine.submit([long_text(), long_text()])
    engine.turn()
    assert groups == [1] and engine.n_rows == 1 and len(engine.waiting) == 1


async def call(app, body, until):
    """Calls the app as a server would, and closes the connection when until(what was sent) is true."""
    sent, is_read = [], False

    async def receive():
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        while not until(sent):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", b"localhost")]}
    scope |= {"query_string": b"", "raw_path": b"/v1/completions", "root_path": "", "scheme": "http"}
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(stream):
    service = new_service(max_rows=2, max_tokens=10**6)
    app, engine = create_app(service), service.engine
    body = {"prompt": "a", "n": 4, "max_tokens": 10**6, "stream": stream, "ignore_eos": True}

    async def scenario():
        service.start()
        await call(app, body, lambda sent: engine.counts["new_tokens"] > 5)  # two rows run, two wait
        for _ in range(1000):
            if not (engine.n_rows or engine.waiting):
                break
            await asyncio.sleep(0.005)
        assert engine.counts["cancelled"] == 4
        engine.close(0)
        await asyncio.to_thread(engine.join, 10)

    asyncio.run(scenario())
    assert not engine.is_alive and engine.n_rows == 0 and not engine.waiting
    assert engine.counts["status_200"] == stream and engine.counts["status_499"] == (not stream)


# ---- the published document -----------------------------------------------------------------------------------------


def test_the_document_says_what_is_checked(client, service):
    """The published schemas are JSON schemas, and another validator agrees with `validate` on good and bad bodies."""
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/health", "/metrics", "/v1/tokenize"}
    schema = schemas.completion_schema(service.bounds)
    published = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert published == json.loads(json.dumps(schema))
    other = jsonschema.Draft202012Validator(schema)
    other.check_schema(schema)
    good = [
        {"prompt": "a", "stop": None, "n": 1.0, "recursion": None},
        {"prompt": [[1], [2]], "recursion": {"trace": 0}},
    ]
    bodies = good + [body for body, _, message in REFUSED if "\\ud800" not in message]
    unknowable = ("model", "suffix", "best_of")  # only the server knows these, or the sum of several settings
    for body in bodies:
        try:
            validate(body, schema)
            is_valid = True
        except schemas.ApiError:
            is_valid = False
        if not set(body) & set(unknowable):
            assert other.is_valid(body) == is_valid, body
    assert all(other.is_valid(body) for body in good)
