"""The web application: routes, checks of who asks, errors in OpenAI's form."""

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from src.page import schemas
from src.page.answers import Answer, until_gone
from src.page.asked import Asked, ask_chat, ask_completion, number_of_texts
from src.page.errors import ApiError
from src.page.figures import prometheus
from src.page.openapi import document
from src.page.service import Service
from src.tokenizer import StreamDecoder

STATIC = Path(__file__).resolve().parent / "static"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}
SPLITS = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::\d{1,5})?$")  # host and port of a Host header


def create_app(service: Service) -> Starlette:
    """Returns the ASGI application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.start()
        yield
        service.engine.close(0)
        await asyncio.to_thread(service.engine.join, 5)

    routes = [
        Route("/", _page, methods=["GET"]),
        Route("/health", functools.partial(_health, service), methods=["GET"]),
        Route("/metrics", functools.partial(_metrics, service), methods=["GET"]),
        Route("/openapi.json", functools.partial(_openapi, service), methods=["GET"]),
        Route("/v1/models", functools.partial(_models, service), methods=["GET"]),
        Route("/v1/models/{name:path}", functools.partial(_model, service), methods=["GET"]),
        Route("/v1/model_card", functools.partial(_card, service), methods=["GET"]),
        Route("/v1/completions", functools.partial(_write, service, is_chat=False), methods=["POST"]),
        Route("/v1/chat/completions", functools.partial(_write, service, is_chat=True), methods=["POST"]),
        Route("/v1/tokenize", functools.partial(_tokenize, service), methods=["POST"]),
        Route("/v1/puzzle", functools.partial(_puzzle, service), methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _failure, ClientDisconnect: _gone}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.add_middleware(Guard, service=service)
    return app


# ---- who asks -------------------------------------------------------------------------------------------------------


class Guard:
    """Refuses requests of other sites' pages and of clients without the key; adds headers to every answer.

    A page of another site can make a browser send requests here. Two checks refuse them: the header Host must name this
    machine, which stops DNS rebinding, and Origin, which browsers add, must be the page's own."""

    def __init__(self, app, service: Service):
        self.app, self.service, self.config = app, service, service.config
        self.names = {"localhost", self.config.host.lower(), *(host.lower() for host in self.config.allowed_hosts)}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client went away before there was an answer

        async def send_more(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message.get("headers", ())}
                more = [(name, value) for name, value in HEADERS.items() if name not in own]
                message = message | {"headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            problem = self.problem(scope["method"], scope["path"], Headers(scope=scope))
            if problem is not None:
                await _error(problem)(scope, receive, send_more)
            else:
                await self.app(scope, receive, send_more)
        except Exception:
            status = 500
            raise
        finally:
            self.service.engine.counts[f"status_{status}"] += 1

    def problem(self, method: str, path: str, headers: Headers) -> ApiError | None:
        """Returns why a request is refused, or None."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self.is_ours(host):
            problem = f"the header Host is {host[:100]!r}, which is not a name of this server: see --allowed_hosts"
            return ApiError(403, problem, None, "wrong_host")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        is_foreign = origin is not None and (origin == "null" or urlsplit_host(origin) != host.lower())
        opens_page = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if is_foreign or (site in ("cross-site", "same-site") and not opens_page):
            problem = "pages of other sites may not use this server: open its own page"
            return ApiError(403, problem, None, "wrong_origin")
        key = self.config.api_key
        if key is not None and (path.startswith("/v1/") or path == "/metrics"):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1", "replace"), f"Bearer {key}".encode()):
                problem = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
                return ApiError(401, problem, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return None

    def is_ours(self, host: str) -> bool:
        """Whether a Host header is localhost, an IP address, or a name that was allowed."""
        found = SPLITS.match(host)
        name = found[1].lower() if found else ""
        if name in self.names:
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return False


def urlsplit_host(origin: str) -> str:
    """Returns host and port of an Origin header, in the form of a Host header; "" if it is broken."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


# ---- errors ---------------------------------------------------------------------------------------------------------


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _api_error(request, error):
    return _error(error)


async def _http_error(request, error):
    messages = {404: f"there is nothing at {request.url.path[:100]}: see /openapi.json"}
    messages[405] = f"{request.method[:20]} is not for {request.url.path[:100]}: see /openapi.json"
    return _error(
        ApiError(error.status_code, messages.get(error.status_code, str(error.detail)), headers=error.headers)
    )


async def _failure(request, error):
    return _error(ApiError(500, "the server failed; its terminal says why"))


async def _gone(request, error):
    return Response(status_code=499)


# ---- endpoints ------------------------------------------------------------------------------------------------------


async def _page(request: Request):
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


async def _health(service: Service, request: Request):
    engine = service.engine
    is_well = engine.is_alive and engine.deadline is None
    facts = {"status": "ok" if is_well else "closing", "running": engine.n_rows, "waiting": len(engine.waiting)}
    return JSONResponse(facts, 200 if is_well else 503)


async def _metrics(service: Service, request: Request):
    return PlainTextResponse(prometheus(service), media_type="text/plain; version=0.0.4")


async def _openapi(service: Service, request: Request):
    return JSONResponse(document(service.bounds, service.puzzle is not None))


def _facts_of_model(service):
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "generative-trm"}


async def _models(service: Service, request: Request):
    return JSONResponse({"object": "list", "data": [_facts_of_model(service)]})


async def _model(service: Service, request: Request):
    _check_model(service, request.path_params["name"])
    return JSONResponse(_facts_of_model(service))


def _check_model(service, name):
    if name is not None and name != service.name:
        raise ApiError(404, f"there is no model {name[:100]!r} here: use {service.name!r}", "model", "model_not_found")


async def _card(service: Service, request: Request):
    return JSONResponse(service.card())


async def _write(service: Service, request: Request, is_chat: bool):
    body = await _read(service, request)
    schema = schemas.chat_schema if is_chat else schemas.completion_schema
    schemas.validate(body, schema(service.bounds))
    _check_model(service, body.get("model"))
    service.check_number(number_of_texts(body))  # now, because each text takes time to prepare
    ask = ask_chat if is_chat else ask_completion
    asked: Asked = ask(body, service.model, service.tokenizer, service.bounds.tokens)
    service.check_rule(asked.texts[0].rule, asked.texts[0].reads_steps)
    return Answer(asked, service)


async def _tokenize(service: Service, request: Request):
    body = await _read(service, request)
    schemas.validate(body, schemas.tokenize_schema(service.bounds))
    tokenizer, inside = service.tokenizer, bool(body.get("inside"))
    decoder = StreamDecoder(tokenizer, starts_text=not inside)
    found = [
        {"id": index, "text": decoder.push(index), "bytes": list(tokenizer.id_to_bytes(index))}
        for index in (tokenizer.encode_inside([body["text"]])[0] if inside else tokenizer.encode(body["text"]))
    ]
    if found:
        found[-1]["text"] += decoder.flush()
    return JSONResponse({"tokens": found})


async def _puzzle(service: Service, request: Request):
    body = await _read(service, request)
    if service.puzzle is None:
        raise ApiError(404, "no puzzle model is served: start serve.py with --puzzle FOLDER", None, "no_puzzle")
    schemas.validate(body, schemas.puzzle_schema(service.bounds))
    steps = service.puzzle_steps if body.get("steps") is None else int(body["steps"])
    gone = asyncio.create_task(until_gone(request.receive))
    try:
        solve = functools.partial(service.puzzle.solve, body["board"], steps, body.get("exit") == "halt", gone.done)
        with service.puzzle.place():  # here, because to_thread has a queue of its own, without a bound
            return JSONResponse(await asyncio.to_thread(solve))
    finally:
        gone.cancel()


async def _read(service: Service, request: Request):
    """Returns the JSON object of a request's body. Raises ApiError if it is too long, too slow or broken."""
    data, most = bytearray(), service.config.max_body_kib * 1024
    try:
        async with asyncio.timeout(service.config.body_seconds):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    problem = f"the body has more than {most // 1024} KiB: send less"
                    raise ApiError(413, problem, headers={"Connection": "close"})
    except TimeoutError:
        problem = f"the body was not complete after {service.config.body_seconds:g} s: send it faster"
        raise ApiError(408, problem, headers={"Connection": "close"}) from None
    return schemas.accepted(schemas.parse_body(bytes(data)))
