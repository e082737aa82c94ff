"""
A server whose latencies are known: every answer has its first token and each further one at fixed times.

    python benchmarks/aiperf/paced_server.py --port 8001

The times are absolute, from when a request has arrived, so that a token that is late does not delay the others. It
speaks as much of the OpenAI API as load generators need for streamed completions.
"""

import argparse
import asyncio
import json

from aiohttp import web

MODEL = "paced"
FIRST_TOKEN_S = 0.1
BETWEEN_TOKENS_S = 0.01


async def models(_: web.Request) -> web.Response:
    """The one model."""
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


async def completions(request: web.Request) -> web.StreamResponse:
    """As many tokens as asked for, at their times, then the usage."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    body = await request.json()
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    n_tokens = int(body["max_tokens"])
    for number in range(n_tokens):
        due_s = began_s + FIRST_TOKEN_S + number * BETWEEN_TOKENS_S
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        reason = "length" if number == n_tokens - 1 else None
        await _send(answer, [{"index": 0, "text": " word", "finish_reason": reason}])
    n_prompt = len(str(body["prompt"]).split())
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_tokens, "total_tokens": n_prompt + n_tokens}
    await _send(answer, [], usage)
    await answer.write(b"data: [DONE]\n\n")
    return answer


async def metrics(_: web.Request) -> web.Response:
    """None."""
    return web.Response()


async def _send(answer: web.StreamResponse, choices: list[object], usage: dict[str, int] | None = None) -> None:
    chunk = {"id": "cmpl-paced", "object": "text_completion", "created": 0, "model": MODEL, "choices": choices}
    await answer.write(b"data: " + json.dumps({**chunk, "usage": usage}).encode() + b"\n\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.get("/metrics", metrics)])
    app.add_routes([web.post("/v1/completions", completions)])
    web.run_app(app, host="127.0.0.1", port=parser.parse_args().port, print=None)
