"""The published document of the API: GET /openapi.json."""

from src.page import schemas
from src.page.schemas import Bounds

INTEGER, NUMBER, STRING, BOOLEAN = ({"type": kind} for kind in ("integer", "number", "string", "boolean"))
ANY = {"type": "object"}


def _object(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items):
    return {"type": "array", "items": items}


ERROR = _object(error=_object(message=STRING, type=STRING, param={}, code={}))
TOKEN = _object(id=INTEGER, text=STRING, bytes=_list(INTEGER))
USAGE = _object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER, recursion_steps=INTEGER)
ANSWER = _object(id=STRING, object=STRING, created=INTEGER, model=STRING, choices=_list(ANY), usage=USAGE)
MODEL = _object(id=STRING, object=STRING, created=INTEGER, owned_by=STRING)


def document(bounds: Bounds, has_puzzle: bool) -> dict:
    """Returns the OpenAPI 3.1 document of a server with these bounds."""
    b, refused = bounds, (400, 408, 413)
    paths = {
        "/health": {"get": _operation("whether the server is well", ANY, codes=(503,))},
        "/metrics": {"get": _operation("counts, as Prometheus reads them", None, codes=(401,))},
        "/openapi.json": {"get": _operation("this document", ANY)},
        "/v1/models": {"get": _operation("the served model", _object(object=STRING, data=_list(MODEL)), codes=(401,))},
        "/v1/model_card": {"get": _operation("facts about the served model", ANY, codes=(401,))},
        "/v1/completions": {
            "post": _operation(
                "continue texts", ANSWER, schemas.completion_schema(b), (*refused, 401, 404, 429, 503), True
            )
        },
        "/v1/chat/completions": {
            "post": _operation("answer in a chat", ANSWER, schemas.chat_schema(b), (*refused, 401, 404, 429, 503), True)
        },
        "/v1/tokenize": {
            "post": _operation(
                "tokens of a text", _object(tokens=_list(TOKEN)), schemas.tokenize_schema(b), (*refused, 401)
            )
        },
    }
    if has_puzzle:
        solved = _object(steps=_list(ANY), solved=BOOLEAN, message=STRING)
        codes = (*refused, 401, 429)
        paths["/v1/puzzle"] = {"post": _operation("solve a board", solved, schemas.puzzle_schema(b), codes)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Generative TRM", "version": "1", "description": "docs/server.md explains it"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(summary, answer, body=None, codes=(), streams=False):
    content = {"text/plain": {"schema": STRING}} if answer is None else {"application/json": {"schema": answer}}
    if streams:
        content["text/event-stream"] = {"schema": STRING}
    error = {"application/json": {"schema": ERROR}}
    responses = {"200": {"description": "done", "content": content}}
    for code in sorted({*codes, 403}):
        responses[str(code)] = {"description": "refused", "content": error}
    operation = {"summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation
