"""Serves an adapter's drawings behind OpenAI's images API, so that its clients draw with it: POST /v1/images/generations.

    python recipes/serve_images.py
    python recipes/serve_images.py --adapter your-org/janus-pro-1b-uc4x --device cuda --port 8001

Needs: pip install -c constraints.txt -e ".[serve]". Tested on two CPU cores with the tiny pair.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn
from anyio import from_thread, to_thread
from demo.port import listening
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, Field, model_validator
from starlette.requests import ClientDisconnect

from uc_adapters.errors import InputError
from uc_adapters.pipeline import UniCompressPipeline

CARDS = Path(__file__).parents[1] / "model_cards"


class Order(BaseModel, extra="forbid"):
    """The body of a request. Each description is what an error tells a client to send."""

    prompt: str = Field(min_length=1, max_length=32_000, description="a text of 1 to 32000 characters that says what to draw")
    model: str | None = Field(None, description="the id that GET /v1/models gives, or nothing")
    n: int = Field(1, ge=1, le=10, description="a whole number from 1 to 10")
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="WIDTHxHEIGHT in pixels, or 'auto'")
    response_format: Literal["b64_json"] = Field("b64_json", description="'b64_json', since no picture is kept for a URL")
    user: str | None = Field(None, description="a text, or nothing")
    # Beyond OpenAI's API, by the client's extra_body; the names are those of vLLM-Omni's and SGLang's images APIs
    seed: int | None = Field(None, ge=0, lt=2**63, description="a whole number, 0 or more: image i is drawn with seed + i")
    guidance_scale: float | None = Field(None, description="a number, 0 or more")
    negative_prompt: str | None = Field(None, max_length=32_000, description="a text of at most 32000 characters")
    temperature: float | None = Field(None, description="a number above 0")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """The body without its fields that are null, which stand for their defaults."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


def build(pipe: UniCompressPipeline, name: str) -> FastAPI:
    """The server. It draws for one client at a time; the others wait for their turn.

    Args:
        pipe: Draws.
        name: The model's id in requests and answers.
    """
    api, turn, started = FastAPI(title="uc-adapters"), asyncio.Lock(), int(time.time())
    pipe.set_progress_bar_config(disable=True)

    @api.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "uc-adapters"}]}

    @api.post("/v1/images/generations")
    async def generations(order: Order, request: Request) -> Response:
        if order.model not in (None, name):
            message = f"There is no model {shortened(order.model)} here; expected {name!r}."
            return refused(message, "model", "model_not_found", status=404)

        def stop_if_gone(*_) -> None:  # called behind each step, in the thread that draws
            if from_thread.run(request.is_disconnected):
                raise ClientDisconnect

        async with turn:
            images = await to_thread.run_sync(draw, pipe, order, stop_if_gone)
        return JSONResponse({"created": int(time.time()), "data": [{"b64_json": png(image)} for image in images]})

    @api.exception_handler(ClientDisconnect)
    async def gone(*_) -> Response:
        return Response(status_code=499)  # nobody reads it; the log shows it

    @api.exception_handler(InputError)
    async def invalid(_, error: InputError) -> Response:
        return refused(str(error))

    @api.exception_handler(RequestValidationError)
    async def malformed(_, error: RequestValidationError) -> Response:
        return refused(*explained(error.errors()[0]))

    return api


def draw(pipe: UniCompressPipeline, order: Order, stop_if_gone: Callable) -> list[Image.Image]:
    """Draws what a request asks for: image i is the one that its prompt draws alone with seed + i."""
    stop_if_gone()  # whoever left while waiting for a turn is not drawn for
    seed = random.randrange(2**32) if order.seed is None else order.seed
    width, height = (None, None) if order.size == "auto" else map(int, order.size.split("x"))
    return pipe(
        order.prompt,
        height=height,
        width=width,
        guidance_scale=order.guidance_scale,
        negative_prompt=order.negative_prompt,
        num_images_per_prompt=order.n,
        generator=[torch.Generator(pipe.device).manual_seed(seed + index) for index in range(order.n)],
        temperature=order.temperature,
        callback_on_step_end=stop_if_gone,
    ).images


def png(image: Image.Image) -> str:
    """An image as a PNG file in base64."""
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def refused(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}, status)


def explained(error: dict) -> tuple[str, str | None]:
    """A sentence that says what is wrong with a request's body, and the argument that it is about."""
    fields = Order.model_fields
    name = error["loc"][1] if len(error["loc"]) > 1 else None
    if error["type"] == "extra_forbidden":
        return f"There is no argument {shortened(name)} here; expected some of {', '.join(fields)}.", name
    if name not in fields:
        return 'The body is no JSON object; expected one, such as {"prompt": "A fox"}, as Content-Type: application/json.', None
    value = "is missing" if error["type"] == "missing" else f"is {shortened(error['input'])}"
    return f"{name} {value}; expected {fields[name].description}.", name


def shortened(value: object) -> str:
    """A value in an error: a client may send a book."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves an adapter's drawings behind OpenAI's images API.")
    parser.add_argument("--adapter", help="the adapter: a folder or a Hub id; default: the tiny pair's")
    parser.add_argument("--base", help="the base: a folder or a Hub id; default: the one that the adapter names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--dtype", default="auto", help="of the base: float32, bfloat16, float16; default: its own")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines, too; there is no password")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.adapter is None:
        args.adapter, args.base = str(CARDS / "tiny-janus-uc4x"), args.base or str(CARDS / "tiny-janus")
    listener = listening(args.port, args.host)  # before anything is loaded
    try:
        pipe = UniCompressPipeline.from_pretrained(args.adapter, base_model=args.base, dtype=args.dtype, device_map=args.device)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--adapter {args.adapter}: {error}") from None
    name = Path(args.adapter).name if Path(args.adapter).is_dir() else args.adapter  # clients need no path of this machine
    with suppress(KeyboardInterrupt):  # the drawing under way is finished first
        uvicorn.Server(uvicorn.Config(build(pipe, name))).run([listener])


if __name__ == "__main__":
    main(arguments())
