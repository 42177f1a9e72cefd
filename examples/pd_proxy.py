"""A PD proxy that knows nothing of Tandem: it drives one prefill and one decode engine by `kv_transfer_params`.

It works as the proxies that people run in front of vLLM do. It asks the prefill engine for one token, and passes what
that answers in `kv_transfer_params` to the decode engine, unchanged, with the client's request.

    python pd_proxy.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --port 8000
"""

import argparse
import uuid
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

ASK_FOR_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
NOT_FOR_PREFILL = ("max_completion_tokens", "min_tokens", "stream_options")


class Proxy:
    def __init__(self, prefill: str, decode: str) -> None:
        self.prefill = prefill
        self.decode = decode

    async def session(self, app: web.Application) -> AsyncIterator[None]:
        async with ClientSession(timeout=ClientTimeout(total=None)) as self.http:
            yield

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers = {"X-Request-Id": request.headers.get("X-Request-Id", uuid.uuid4().hex)}
        status, prefilled = await self.prefilled(request.path, body, headers)
        if status != 200:
            return web.json_response(prefilled, status=status)
        params = {"kv_transfer_params": prefilled["kv_transfer_params"]}
        async with self.http.post(self.decode + request.path, json=body | params, headers=headers) as answer:
            response = web.StreamResponse(
                status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]}
            )
            await response.prepare(request)
            async for part in answer.content.iter_any():
                await response.write(part)
            await response.write_eof()
            return response

    async def prefilled(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
        """The prompt computed and one token made; the decode engine will make that token again."""
        kept = {name: value for name, value in body.items() if name not in NOT_FOR_PREFILL}
        changed = kept | {"max_tokens": 1, "stream": False, "kv_transfer_params": ASK_FOR_PREFILL}
        async with self.http.post(self.prefill + path, json=changed, headers=headers) as answer:
            return answer.status, await answer.json()

    async def relay(self, request: web.Request) -> web.Response:
        """What needs no prefill is the decode engine's."""
        async with self.http.get(self.decode + request.path) as answer:
            # An empty body has no type: vLLM's /health answers so.
            kind = {name: answer.headers[name] for name in ("Content-Type",) if name in answer.headers}
            return web.Response(body=await answer.read(), status=answer.status, headers=kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", required=True, help="URL of the prefill engine's API")
    parser.add_argument("--decode", required=True, help="URL of the decode engine's API")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    proxy = Proxy(options.prefill, options.decode)
    app = web.Application()
    app.cleanup_ctx.append(proxy.session)
    app.router.add_post("/v1/completions", proxy.generate)
    app.router.add_post("/v1/chat/completions", proxy.generate)
    app.router.add_get("/{path:.*}", proxy.relay)
    web.run_app(app, host=options.host, port=options.port, print=None)


if __name__ == "__main__":
    main()
