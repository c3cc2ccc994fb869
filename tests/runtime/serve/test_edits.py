"""Edits over the API: OpenAI's client and form, what is drawn anew, and files that cannot be."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

from far_runtime.engines.base import EngineOptions
from far_runtime.images.edit import Edit, compose
from far_runtime.images.writing import read_metadata
from far_runtime.pipeline import Pipeline
from far_runtime.serve.auth import ApiKeys, RateLimiter
from far_runtime.serve.batching import QueueConfig
from far_runtime.serve.service import Limits
from far_runtime.serve.uploads import read_edit

EDITS, SIZE = "/v1/images/edits", 16
PICTURE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
CHANGE = np.zeros((SIZE, SIZE), bool)
CHANGE[:8, 4:] = True


def file_of(array: Any, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind, **options)
    return data.getvalue()


def cut_out(array: Any, change: Any) -> bytes:
    """A picture that is transparent where it is to change."""
    return file_of(np.dstack([array, np.where(change, 0, 255).astype(np.uint8)]))


WHITE, CLEAR = file_of(np.where(CHANGE, 255, 0).astype(np.uint8)), cut_out(PICTURE, CHANGE)


@pytest.fixture(scope="module")
def address(serve: Any, tiny: Any) -> Iterator[str]:
    with serve(tiny.bundle, tiny.t2i_bundle, limits=Limits(max_upload=200_000, max_pixels=10_000)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def pixels_of(response: dict[str, Any]) -> list[Any]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))) for image in response["data"]]


def test_openais_client_edits_as_far_edit_does(address: str, tiny: Any, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    response = client.images.edit(
        image=("a.png", file_of(PICTURE)), mask=("m.png", CLEAR), prompt="3", n=2, size="16x16",
        extra_body={"seed": 7, "steps": "2", "guidance": 1.5, "levels": "0,1,3"},
    )  # fmt: skip
    with Pipeline.from_bundle(tiny.bundle, "onnxruntime", options=EngineOptions(threads=1)) as pipeline:
        drawn = pipeline.edit([3, 3], [7, 8], PICTURE, ~CHANGE, steps="2", guidance=1.5, levels="0,1,3")
    expected = compose(drawn.images, Edit(PICTURE, CHANGE))
    assert response.data is not None and len(response.data) == 2
    for i, image in enumerate(response.data):
        file = tmp_path / f"{i}.png"
        file.write_bytes(base64.b64decode(image.b64_json or ""))
        pixels = np.asarray(Image.open(file))
        assert (pixels == expected[i]).all() and (pixels[~CHANGE] == PICTURE[~CHANGE]).all()
        assert (pixels != PICTURE).any()
        settings = read_metadata(file)
        assert settings.sampling == drawn.settings[i].sampling
        assert settings.edited.keys() == {"image", "mask", "feather"}


@pytest.mark.parametrize(
    ("files", "fields", "change"),
    [
        ({"image": file_of(PICTURE), "mask": WHITE}, {}, CHANGE),
        ({"image": file_of(PICTURE), "mask": CLEAR}, {}, CHANGE),
        ({"image": CLEAR}, {}, CHANGE),
        ({"image": file_of(PICTURE)}, {"outpaint": "top=4"}, np.arange(SIZE)[:, None].repeat(SIZE, 1) < 4),
    ],
)
def test_the_part_to_draw_is_given_in_four_ways(
    client: httpx.Client, files: dict[str, bytes], fields: dict[str, str], change: Any
) -> None:
    edit = read_edit(files["image"], files.get("mask"), fields.get("outpaint"), SIZE, 10_000)
    assert (edit.change == change).all()
    response = client.post(EDITS, data={"label": "2", "seed": "1", "steps": "2", **fields}, files=files)
    assert response.status_code == 200, response.text
    (pixels,) = pixels_of(response.json())
    assert (pixels[~change] == edit.image[~change]).all()


def test_an_edit_streams_its_levels_into_the_picture(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    files: dict[str, Any] = {"image": ("a.png", file_of(PICTURE)), "mask": ("m.png", CLEAR)}
    fields = {"seed": 7, "steps": "2"}
    events = list(client.images.edit(**files, prompt="3", stream=True, partial_images=1, extra_body=fields))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    (whole,) = client.images.edit(**files, prompt="3", extra_body=fields).data or []
    assert events[1].b64_json == whole.b64_json
    for event in events:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json))))
        assert (pixels[~CHANGE] == PICTURE[~CHANGE]).all()


def test_nothing_of_the_file_goes_on_but_its_pixels(client: httpx.Client) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret words"
    sent = file_of(PICTURE, "PNG", exif=exif, icc_profile=b"secret words")
    assert b"secret words" in sent
    fields = {"label": "2", "steps": "1", "output_format": "png"}
    response = client.post(EDITS, data=fields, files={"image": sent, "mask": WHITE}).json()
    assert b"secret" not in base64.b64decode(response["data"][0]["b64_json"])


def test_without_a_prompt_the_picture_says_what_to_draw(client: httpx.Client) -> None:
    files = {"image": file_of(PICTURE), "mask": WHITE}
    response = client.post(EDITS, data={"steps": "1", "prompt": ""}, files=files).json()
    assert response["data"][0]["settings"]["sampling"]["guidance"] == 1
    with_text = client.post(EDITS, data={"steps": "1", "model": "bundle_t2i", "prompt": "a hat"}, files=files).json()
    assert with_text["data"][0]["settings"]["name"] == "a hat"


def test_pictures_of_one_edit_share_a_batch(client: httpx.Client) -> None:
    files = {"image": file_of(PICTURE), "mask": WHITE}
    response = client.post(EDITS, data={"steps": "1", "label": "1", "n": "3", "seed": "5"}, files=files).json()
    assert [image["settings"]["batch"] for image in response["data"]] == [3, 3, 3]
    alone = client.post(EDITS, data={"steps": "1", "label": "1", "seed": "6"}, files=files).json()
    difference = pixels_of(response)[1].astype(int) - pixels_of(alone)[0]
    assert abs(difference).max() <= 1


def bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PAIR = {"image": file_of(PICTURE), "mask": WHITE}


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        ({}, {}, "image: Field required"),
        ({"image": b"GIF89a no picture"}, {}, "image: cannot be read as a picture"),
        ({"image": file_of(PICTURE, "GIF"), "mask": WHITE}, {}, "no picture of a known kind"),
        ({"image": file_of(PICTURE)[:99], "mask": WHITE}, {}, "image: cannot be read as a picture"),
        ({"image": bomb(30_000), "mask": WHITE}, {}, "image: more than 0.01 million pixels"),
        ({"image": file_of(PICTURE), "mask": bomb(101)}, {}, "mask: more than 0.01 million pixels"),
        ({"image": file_of(PICTURE), "mask": file_of(PICTURE[:8])}, {}, "mask: 16 x 8 pixels, image has 16 x 16"),
        ({"image": file_of(PICTURE), "mask": file_of(0 * PICTURE)}, {}, "mask: nothing to change"),
        ({"image": file_of(PICTURE)}, {}, "neither mask nor outpaint"),
        (PAIR, {"outpaint": "top=4"}, "mask and outpaint exclude each other"),
        ({"image": file_of(PICTURE)}, {"outpaint": "up=4"}, "outpaint up=4: side 'up'"),
        ({"image": file_of(PICTURE)}, {"outpaint": "top=16"}, "leaves no picture"),
        (PAIR, {"guidance": "3"}, "guidance leads towards a prompt or label"),
        (PAIR, {"feather": "-1"}, "feather"),
        (PAIR, {"steps": "many"}, "steps"),
        (PAIR, {"n": "9"}, "n 9: this server draws up to 8"),
        (PAIR, {"label": "99"}, "99"),
        (PAIR, {"unknown": "1"}, "unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(client: httpx.Client, files: Any, fields: dict[str, str], message: str) -> None:
    response = client.post(EDITS, data={"steps": "1", **fields}, files=files or {"other": b""})
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


def test_a_larger_upload_is_refused(client: httpx.Client) -> None:
    response = client.post(EDITS, files={"image": bytes(200_001)})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "large_body")


def test_nothing_is_decoded_for_a_request_that_may_not_be(serve: Any, tiny: Any) -> None:
    broken = {"image": b"no picture"}
    with (
        serve(tiny.bundle, rate_limiter=RateLimiter(1), queue=QueueConfig(max_queue=1)) as address,
        httpx.Client(base_url=address) as client,
    ):
        assert "cannot be read as a picture" in client.post(EDITS, files=broken, data={"label": "1"}).text
        assert (
            client.post(EDITS, files=PAIR, data={"label": "1", "steps": "1"}).status_code == 200
        )  # what failed cost nothing
        assert client.post(EDITS, files=broken, data={"label": "1"}).status_code == 429
        assert "99" in client.post(EDITS, files=broken, data={"label": "99"}).text
    with serve(tiny.bundle, queue=QueueConfig(max_queue=1)) as address, httpx.Client(base_url=address) as client:
        response = client.post(EDITS, files=broken, data={"label": "1", "n": "2"})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")


def test_no_body_is_read_without_a_key(serve: Any, tiny: Any) -> None:
    limits = Limits(max_upload=1000)
    with (
        serve(tiny.bundle, keys=ApiKeys(["k" * 16]), limits=limits) as address,
        httpx.Client(base_url=address) as client,
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic " + "k" * 16}):
            response = client.post(EDITS, content=bytes(5000), headers=headers)
            assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        assert (
            client.post(EDITS, content=bytes(5000), headers={"Authorization": f"bearer {'k' * 16}"}).status_code == 413
        )
        assert 'far_rejections_total{reason="key"} 3.0' in client.get("/metrics").text


def test_pages_of_other_sites_are_not_answered(serve: Any, tiny: Any) -> None:
    hosts = frozenset(("localhost", "127.0.0.1"))
    with serve(tiny.bundle, hosts=hosts) as address, httpx.Client(base_url=address) as client:
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            response = client.post(EDITS, files=PAIR, data={"steps": "1"}, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_origin")
        own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
        assert client.post(EDITS, files=PAIR, data={"steps": "1"}, headers=own).status_code == 200


def test_greys_of_16_bits_are_clear_where_their_file_says_so() -> None:
    grey = np.full((SIZE, SIZE), 40_000, np.uint16)
    grey[CHANGE] = 513
    data = io.BytesIO()
    Image.fromarray(grey).save(data, "PNG", transparency=513)
    edit = read_edit(data.getvalue(), None, None, SIZE, 10_000)
    assert (edit.change == CHANGE).all()
    assert (edit.image[~CHANGE] == round(40_000 / 257)).all()


def test_a_bundle_that_cannot_edit_says_so(serve: Any, tiny: Any, tmp_path: Path) -> None:
    def without_encode(model: Any) -> None:
        manifest = model.manifest
        graphs = tuple(graph for graph in manifest.graphs if graph.stage != "encode")
        object.__setattr__(manifest, "graphs", graphs)

    with serve(tiny.bundle, prepare=without_encode) as address, httpx.Client(base_url=address) as client:
        assert client.get("/v1/models").json()["data"][0]["far"]["editing"] is False
        response = client.post(EDITS, files=PAIR)
    assert response.status_code == 400
    assert "has no encode stage" in response.json()["error"]["message"]
