"""The images server, asked by OpenAI's own client: drawings, errors, clients at once, and clients that go away."""

import base64
import copy
import io
import json
import socket
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("fastapi", reason='the images server needs FastAPI: pip install -c constraints.txt -e ".[serve]"')
pytest.importorskip("openai", reason='OpenAI\'s client asks the server: pip install -c constraints.txt -e ".[test]"')

import numpy as np
import openai
import serve_images
import torch
import uvicorn
from demo.port import listening
from helpers import CAPTIONS, attach
from PIL import Image

from uc_adapters.pipeline import UniCompressPipeline

NAME = "org/uc4x"
STEPS = 16  # of a drawing


class Watched(UniCompressPipeline):
    """Tells how far a drawing has come."""

    steps = 0

    def __call__(self, *args, callback_on_step_end=lambda *_: None, **kwargs):
        def count(*step):
            self.steps += 1
            callback_on_step_end(*step)

        return super().__call__(*args, callback_on_step_end=count, **kwargs)


@contextmanager
def served(pipe):
    """The address of a server in this process."""
    listener = listening(0)
    server = uvicorn.Server(uvicorn.Config(serve_images.build(pipe, NAME), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def pipe(pristine, processor):
    model = attach(copy.deepcopy(pristine))
    return Watched(model.compact_processor(processor), model)


@pytest.fixture(scope="module")
def address(pipe):
    with served(pipe) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url="http://{}:{}/v1".format(*address), api_key="none", max_retries=0) as client:
        yield client


def drawn(client, prompt: str, **arguments) -> list[Image.Image]:
    answer = client.images.generate(prompt=prompt, **arguments)
    return [Image.open(io.BytesIO(base64.b64decode(image.b64_json))) for image in answer.data]


def alone(pipe, prompt: str, *seeds: int, **arguments) -> list[Image.Image]:
    """What the pipeline draws of each seed without a server."""
    return [pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images[0] for seed in seeds]


def same(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def test_it_draws_what_the_pipeline_draws(client, pipe):
    assert same(drawn(client, CAPTIONS[0], model=NAME, extra_body={"seed": 5}), alone(pipe, CAPTIONS[0], 5))
    options = {"guidance_scale": 3.0, "negative_prompt": "a cyan 9", "temperature": 0.7}
    asked = {"n": 2, "size": "64x64", "response_format": "b64_json", "user": "ann", "extra_body": {"seed": 5, **options}}
    assert same(drawn(client, CAPTIONS[0], **asked), alone(pipe, CAPTIONS[0], 5, 6, **options))


def test_what_is_null_or_an_empty_negative_prompt_is_its_default(client, pipe):
    nulls = dict.fromkeys(("n", "size", "response_format", "user", "temperature"))
    extra = {"seed": 5, "negative_prompt": "", **nulls}
    assert same(drawn(client, CAPTIONS[0], extra_body=extra), alone(pipe, CAPTIONS[0], 5))


def test_without_a_seed_every_drawing_is_another(client):
    first, second = (drawn(client, CAPTIONS[0])[0] for _ in range(2))
    assert not np.array_equal(first, second)


def test_it_lists_its_model(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_clients_at_once_each_get_their_own_drawing(client, pipe):
    expected = [alone(pipe, prompt, seed) for seed, prompt in enumerate(CAPTIONS)]
    with ThreadPoolExecutor(len(CAPTIONS)) as clients:
        asked = [clients.submit(drawn, client, prompt, extra_body={"seed": seed}) for seed, prompt in enumerate(CAPTIONS)]
        got = [each.result() for each in asked]
    assert all(map(same, got, expected))


def test_a_client_that_goes_away_is_not_drawn_for_any_longer(client, address, pipe):
    expected, before = alone(pipe, CAPTIONS[1], 3), pipe.steps
    body = json.dumps({"prompt": CAPTIONS[0], "n": 10, "seed": 0}).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(address) as leaving:
        leaving.sendall(head.encode() + b"\r\n\r\n" + body)
        while pipe.steps == before:
            pass
    assert same(drawn(client, CAPTIONS[1], extra_body={"seed": 3}), expected)
    assert pipe.steps - before < 10 * STEPS


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 400, "prompt", "prompt is missing; expected a text"),
        ({"prompt": ""}, 400, "prompt", "prompt is ''; expected a text"),
        ({"prompt": " "}, 400, None, "prompt=' '; expected a text"),
        ({"prompt": ["a red 3"]}, 400, "prompt", "expected a text"),
        ({"prompt": None}, 400, "prompt", "prompt is missing; expected a text"),
        ({"prompt": "a <image_placeholder> b"}, 400, None, "the image token <image_placeholder> in its text"),
        ({"prompt": "red " * 1000}, 400, None, "tokens is too long for the base: expected at most"),
        ({"prompt": "red " * 10_000}, 400, "prompt", "expected a text of 1 to 32000 characters"),
        ({"prompt": "a red 3", "n": 0}, 400, "n", "n is 0; expected a whole number from 1 to 10"),
        ({"prompt": "a red 3", "n": 11}, 400, "n", "n is 11; expected a whole number from 1 to 10"),
        ({"prompt": "a red 3", "n": "many"}, 400, "n", "n is 'many'; expected"),
        ({"prompt": "a red 3", "model": "dall-e-3"}, 404, "model", "There is no model 'dall-e-3' here; expected 'org/uc4x'"),
        ({"prompt": "a red 3", "size": "1024x1024"}, 400, None, "height=1024, width=1024; expected 64 for both"),
        ({"prompt": "a red 3", "size": "big"}, 400, "size", "size is 'big'; expected WIDTHxHEIGHT"),
        ({"prompt": "a red 3", "response_format": "url"}, 400, "response_format", "'url'; expected 'b64_json'"),
        (
            {"prompt": "a red 3", "quality": "hd"},
            400,
            "quality",
            "There is no argument 'quality' here; expected some of prompt",
        ),
        ({"prompt": "a red 3", "seed": -1}, 400, "seed", "seed is -1; expected a whole number, 0 or more"),
        ({"prompt": "a red 3", "temperature": 0}, 400, None, "temperature=0.0; expected a number above 0"),
        ({"prompt": "a red 3", "guidance_scale": -1}, 400, None, "guidance_scale=-1.0; expected a number"),
        (["a red 3"], 400, None, "The body is no JSON object"),
    ],
)
def test_bad_input_is_a_sentence_in_openais_form(client, body, status, param, words):
    with pytest.raises(openai.APIStatusError) as raised:
        client.post("/images/generations", cast_to=object, body=body)
    assert (raised.value.status_code, raised.value.param) == (status, param)
    assert words in raised.value.body["message"]
    assert len(raised.value.body["message"]) < 400
    assert raised.value.body["type"] == "invalid_request_error"


def test_a_body_that_is_no_json(client):
    with pytest.raises(openai.BadRequestError, match="The body is no JSON object"):
        client.post("/images/generations", cast_to=object, content=b"{")


def args(**changed) -> Namespace:
    return Namespace(**{"adapter": "org/none", "base": None, "device": "cpu", "dtype": "auto", "host": "127.0.0.1"} | changed)


def test_a_port_that_is_taken_is_told_in_one_line_before_anything_is_loaded(address):
    with pytest.raises(SystemExit, match=f"--port {address[1]}: Address already in use.*; expected a free port") as stop:
        serve_images.main(args(port=address[1]))
    assert "\n" not in str(stop.value)


@pytest.mark.usefixtures("hub")
def test_an_adapter_that_is_none():
    with pytest.raises(SystemExit, match="--adapter org/none: 'org/none' is no folder here"):
        serve_images.main(args(port=0))
