"""Endpoints of the page that show a conversation and its focus: /focus, and /focus/text, edits, find and look."""

import asyncio
from dataclasses import asdict
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Body
from pydantic import Field

from nanochat.find import find_text
from nanochat.serving.schema import ApiError, ConversationId
from nanochat.tokenizer import readable

SHOWN_TOKENS = 256  # of each span, in an answer to /focus/text
FOUND_PLACES = 20  # in one answer to /focus/find
SCANNED_TOKENS = 2**21  # in one answer to /focus/find
AROUND = 12  # tokens shown before and after what was found

Name = Annotated[ConversationId, Body(embed=True)]
Index = Annotated[int, Field(strict=True, ge=0, lt=2**48)]  # of a token
Span = Annotated[list[Index], Field(min_length=2, max_length=2)]  # start, and end, which is not included
Text = Annotated[str, Body(strict=True, min_length=1, max_length=4000)]


def create_router(service):
    """An APIRouter; each path takes the conversation's name."""
    router = APIRouter(prefix="/focus")

    def texts(conversation, spans):
        """The text of each span of tokens [start, end), or None if there is no such conversation."""
        sessions = service.sessions_of(conversation)
        tokens = (sessions.tokens(conversation, *span) for span in spans)
        return [None if ids is None else readable(service.pool.tokenizer, ids) for ids in tokens]

    @router.post("")
    async def focus(conversation: Name):
        return {"focus": service.sessions_of(conversation).focus(conversation)}

    @router.post("/text")
    async def text(conversation: Name, spans: Annotated[list[Span], Body(max_length=64)]):
        spans = [(start, min(end, start + SHOWN_TOKENS)) for start, end in spans]
        return {"texts": await asyncio.to_thread(texts, conversation, spans)}

    @router.post("/edits")
    async def edits(conversation: Name):
        return {"edits": service.sessions_of(conversation).edits(conversation)}

    def search(conversation, text, start):
        sessions, end = service.sessions_of(conversation), start + SCANNED_TOKENS

        def read(first, last):
            return sessions.tokens(conversation, first, last) or []

        found = list(islice(find_text(read, service.pool.tokenizer, text, start, end), FOUND_PLACES))
        then = found[-1][0] + 1 if len(found) == FOUND_PLACES else end
        around = texts(conversation, [(max(0, first - AROUND), last + AROUND) for first, last in found])
        found = [{"start": a, "end": b, "text": text} for (a, b), text in zip(found, around, strict=True)]
        return {"found": found, "next": then if read(then, then + 1) else None}

    searching = asyncio.Semaphore(1)  # it holds the interpreter, which the workers need too

    @router.post("/find")
    async def find(conversation: Name, text: Text, start: Annotated[Index, Body()] = 0):
        async with searching:
            return await asyncio.to_thread(search, conversation, text, start)

    @router.post("/look")
    async def look(conversation: Name, text: Text):
        sessions, ids = service.sessions_of(conversation), service.pool.tokenizer.encode(text)
        answer = service.pool.call(sessions, lambda: sessions.look(conversation, ids))
        found = await asyncio.wrap_future(answer)
        if found is None:
            raise ApiError(404, "there is no such conversation here", "not_found")
        return {"found": [asdict(block) for block in found]}

    return router
