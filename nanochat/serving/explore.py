"""Endpoints of the page that show a conversation and its focus: /focus, and /focus/text, edits, find and look."""

import asyncio
from dataclasses import asdict
from itertools import islice

from fastapi import APIRouter

from nanochat.find import find_text
from nanochat.serving import schema
from nanochat.serving.schema import ApiError
from nanochat.streaming import readable

SCANNED_TOKENS = 2**21  # in one answer to /focus/find
AROUND = 12  # tokens shown before and after what was found


def create_router(service):
    """An APIRouter; each path takes the conversation's name."""
    router = APIRouter(prefix="/focus")

    def texts(conversation, spans):
        """The text of each span of tokens [start, end), or None if there is no such conversation."""
        sessions = service.sessions_of(conversation)
        tokens = (sessions.tokens(conversation, *span) for span in spans)
        return [None if ids is None else readable(service.pool.tokenizer, ids) for ids in tokens]

    @router.post("")
    async def focus(body: schema.FocusRequest):
        return {"focus": service.sessions_of(body.conversation).focus(body.conversation)}

    @router.post("/text")
    async def text(body: schema.TextRequest):
        spans = [(start, min(end, start + schema.SHOWN_TOKENS)) for start, end in body.spans]
        return {"texts": await asyncio.to_thread(texts, body.conversation, spans)}

    @router.post("/edits")
    async def edits(body: schema.FocusRequest):
        return {"edits": service.sessions_of(body.conversation).edits(body.conversation)}

    def search(conversation, text, start):
        sessions, end = service.sessions_of(conversation), start + SCANNED_TOKENS

        def read(first, last):
            return sessions.tokens(conversation, first, last) or []

        found = list(islice(find_text(read, service.pool.tokenizer, text, start, end), schema.FOUND_PLACES))
        then = found[-1][0] + 1 if len(found) == schema.FOUND_PLACES else end
        around = texts(conversation, [(max(0, first - AROUND), last + AROUND) for first, last in found])
        found = [{"start": a, "end": b, "text": text} for (a, b), text in zip(found, around, strict=True)]
        return {"found": found, "next": then if read(then, then + 1) else None}

    @router.post("/find")
    async def find(body: schema.FindRequest):
        return await asyncio.to_thread(search, body.conversation, body.text, body.start)

    @router.post("/look")
    async def look(body: schema.LookRequest):
        sessions = service.sessions_of(body.conversation)
        ids = service.pool.tokenizer.encode(body.text)
        answer = service.pool.call(sessions, lambda: sessions.look(body.conversation, ids))
        found = await asyncio.wrap_future(answer)
        if found is None:
            raise ApiError(404, "there is no such conversation here", "not_found")
        return {"found": [asdict(block) for block in found]}

    return router
