"""Answers: the pieces that the engine writes, as JSON or as server-sent events, in the form of OpenAI's API."""

import asyncio
import contextlib
import json
import sys
from math import exp

from starlette.responses import JSONResponse, Response

from src.page.asked import Asked
from src.page.engine import Text
from src.page.errors import ApiError
from src.page.writing import Piece, Token, token_string

LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # some clients end a line there; JSON need not
SLACK_S = 10.0  # a client gets the last pieces within so many seconds after a text must have ended


class Parts:
    """What one text of an answer has so far."""

    def __init__(self):
        self.text, self.tokens, self.finish, self.reason = "", [], None, None

    def add(self, piece):
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish, self.reason = piece.finish, piece.reason


class Answer(Response):
    """Sends what is written for a request. Ends its texts as soon as the client is gone."""

    def __init__(self, asked: Asked, service):
        """Queues the texts. Raises ApiError if the queue is full."""
        self.asked, self.service, self.background = asked, service, None
        self.pieces = asyncio.Queue()
        for text in asked.texts:
            text.tag = self.pieces
        service.submit(asked.texts)
        self.numbers = {id(text): number for number, text in enumerate(asked.texts)}

    async def __call__(self, scope, receive, send):
        work = asyncio.create_task(
            self._stream(scope, receive, send) if self.asked.stream else self._whole(scope, receive, send)
        )
        gone = asyncio.create_task(until_gone(receive))
        limit = self.service.config.max_seconds + self.service.config.grace_seconds + SLACK_S
        try:
            await asyncio.wait({work, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.service.engine.cancel([text for text in self.asked.texts if not text.is_over])
            for task in (work, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.gather(work, gone, return_exceptions=True)

    async def _next(self) -> list:
        """Returns [(number of a text, piece), ...]: all that wait, at least one."""
        found = [await self.pieces.get()]
        while not self.pieces.empty():
            found.append(self.pieces.get_nowait())
        return [(self.numbers[id(text)], piece) for text, piece in found]

    # ---- at once ----

    async def _whole(self, scope, receive, send):
        parts = [Parts() for _ in self.asked.texts]
        while any(part.finish is None for part in parts):
            for number, piece in await self._next():
                parts[number].add(piece)
        failed = next((part for part in parts if part.finish == "error"), None)
        if failed is not None:
            response = JSONResponse(ApiError(500, failed.reason).body(), 500)
        else:
            response = JSONResponse(self._body(parts))
        await response(scope, receive, send)
        self._log(parts)

    def _head(self, is_chunk=False) -> dict:
        kind = ("chat.completion" + ".chunk" * is_chunk) if self.asked.is_chat else "text_completion"
        return {"id": self.asked.id, "object": kind, "created": self.asked.created, "model": self.service.name}

    def _body(self, parts) -> dict:
        choices = [self._choice(number, part, begins=True) for number, part in enumerate(parts)]
        return self._head() | {"choices": choices, "usage": self._usage()}

    def _usage(self) -> dict:
        made = sum(text.made for text in self.asked.texts)
        usage = {"prompt_tokens": self.asked.prompt_tokens, "completion_tokens": made}
        usage["total_tokens"] = self.asked.prompt_tokens + made
        return usage | {"recursion_steps": sum(text.steps for text in self.asked.texts)}

    def _choice(self, number, part: Parts | Piece, begins: bool) -> dict:
        """Returns one entry of `choices`, of an answer or of a chunk.  begins: with an echo, the prompt comes first."""
        writer, text, tokens, choice = self.asked.texts[number].writer, part.text, part.tokens, {"index": number}
        if self.asked.echo and begins:
            text, tokens = writer.prompt + text, writer.prompt_tokens + tokens
        if self.asked.is_chat:
            # in a stream, only the first chunk has the role: clients join the fields of all chunks
            content = ({"role": "assistant"} if begins else {}) | {"content": text}
            choice |= {"delta" if self.asked.stream else "message": content}
            choice["logprobs"] = self._chat_logprobs(tokens) if self.asked.logprobs else None
        else:
            choice["text"] = text
            shift = 0 if self.asked.echo else len(writer.prompt)
            choice["logprobs"] = self._logprobs(tokens, shift) if self.asked.logprobs else None
        choice |= {"finish_reason": part.finish, "stop_reason": part.reason}
        if self.asked.recursion:
            choice["recursion"] = {"tokens": [self._seen(token) for token in part.tokens]}
        return choice

    # ---- tokens ----

    def _string(self, index):
        return token_string(self.service.tokenizer, index)

    def _logprobs(self, tokens: list[Token], shift: int) -> dict:
        tops = []
        for token in tokens:
            top = {}
            for index, p in token.top:
                top.setdefault(self._string(index), p)
            if token.logprob is not None:
                top.setdefault(self._string(token.id), token.logprob)
            tops.append(top or None)
        return {
            "tokens": [self._string(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset - shift for token in tokens],
        }

    def _chat_logprobs(self, tokens) -> dict:
        def entry(index, logprob):
            data = list(self.service.tokenizer.id_to_bytes(index))
            return {"token": self._string(index), "logprob": logprob, "bytes": data}

        return {
            "content": [
                entry(token.id, token.logprob) | {"top_logprobs": [entry(*each) for each in token.top]}
                for token in tokens
            ]
        }

    def _seen(self, token: Token) -> dict:
        p = None if token.logprob is None else float(f"{exp(token.logprob):.6g}")
        data = list(self.service.tokenizer.id_to_bytes(token.id))
        found = {"id": token.id, "text": token.text, "bytes": data, "steps": token.steps, "p": p}
        return found | {"trace": token.trace}

    # ---- piece by piece ----

    async def _stream(self, scope, receive, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        parts, fresh = [Parts() for _ in self.asked.texts], set(range(len(self.asked.texts)))
        while any(part.finish is None for part in parts):
            chunks = []
            for number, piece in await self._next():
                parts[number].add(piece)
                if piece.finish == "error":
                    chunks.append(ApiError(500, piece.reason).body())
                elif piece.text or piece.tokens or piece.finish or number in fresh:
                    choice = self._choice(number, piece, begins=number in fresh)
                    chunks.append(self._head(is_chunk=True) | {"choices": [choice]})
                    fresh.discard(number)
            await _send(send, "".join(map(event, chunks)))
        end = ""
        if self.asked.include_usage:
            end = event(self._head(is_chunk=True) | {"choices": [], "usage": self._usage()})
        await _send(send, end + "data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._log(parts)

    def _log(self, parts):
        if self.service.config.log_texts:
            for text, part in zip(self.asked.texts, parts):
                said = {"prompt": text.writer.prompt, "text": part.text, "end": part.reason}
                print(json.dumps(said, ensure_ascii=False), file=sys.stderr)


def event(chunk: dict) -> str:
    """Returns a server-sent event."""
    data = json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {data.translate(LINE_ENDS)}\n\n"


async def _send(send, text: str):
    if text:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def until_gone(receive):
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def deliver(out: list[tuple[Text, object]]):
    """Passes on what the engine has written. Runs in the event loop."""
    for text, piece in out:
        text.tag.put_nowait((text, piece))
