"""The largest request that `dar serve` reads: an ASGI middleware, since Gradio limits uploaded files alone."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]


class BodyLimit:
    """Answers a request whose body says that it is larger with 413, and reads no more of one that does not say.

    Args:
        app: what handles the others.
        most: bytes.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        said = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if scope["type"] == "http" and said.isdigit() and int(said) > self.most:
            await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": f"more than {self.most} bytes".encode()})
            return
        got = 0

        async def read() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return message if got <= self.most else {"type": "http.disconnect"}

        await self.app(scope, read if scope["type"] == "http" else receive, send)
