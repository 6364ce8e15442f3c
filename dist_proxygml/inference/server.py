"""Search in a browser: a page to drop an image on, and the requests that it makes.

    GET    /                        the page
    GET    /api/index               what is searched
    POST   /api/search?k=&skip=     the image as the body, or &like=ID; the nearest images, best first
    GET    /api/image?id=           a small picture
    POST   /api/images?id=&class_name=   add the image in the body
    DELETE /api/images?id=          remove one

    curl --data-binary @bird.jpg 'http://localhost:8000/api/search?k=5'

Nothing leaves the machine, and the page fetches nothing from elsewhere. A page of another site that is open in the same
browser cannot ask for anything here: requests that name another host, or come from another origin, are refused.

Chosen: FastAPI on uvicorn, which check, document and stream requests; one page of plain markup and script. Declined:
gradio, which brings a front end of 70 MB, reports to its makers by default, and has no paging.
"""

import io
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import torch
from fastapi import FastAPI, HTTPException, Query, Request, Response
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, JSONResponse

from dist_proxygml.cli import printable
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.sources import ImageRecord, ImageSource, read_image
from dist_proxygml.inference.embedder import Embedder
from dist_proxygml.inference.live_index import LiveIndex
from dist_proxygml.inference.search import doubt_about
from dist_proxygml.reporting.render import render

MAX_UPLOAD = 64 << 20  # bytes
SIDE = 256  # of a picture, pixels
_MOST = 1000  # answers to a query, over all pages of them
_PICTURES = 2048  # kept in memory, of about 10 KB each

# Scripts and styles of the page itself, pictures from here: nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Service:
    """State behind the requests: a model, an index and the images of its gallery. Safe to use from several threads.

    Args:
        live: the index, with its changes.
        embedder: the model that made it.
        gallery: its images; None where they are not at hand.
        name: what to call it on the page.
    """

    def __init__(self, live: LiveIndex, embedder: Embedder, gallery: ImageSource | None, *, name: str) -> None:
        self.live = live
        self.name = name
        self._embedder = embedder
        self._gallery = gallery
        self._lock = threading.Lock()
        self.picture = lru_cache(_PICTURES)(self._picture)

    def about(self) -> dict[str, Any]:
        """Description of the searched index."""
        model, doubt = self.live.index.model or {}, doubt_about(self.live.index)
        with self._lock:
            num_images = len(self.live)
        return {
            "name": self.name,
            "num_images": num_images,
            "kind": self.live.index.kind,
            "model": {name: model.get(name) for name in ("run", "step")},
            "doubt": None if doubt is None else {"below": doubt.below, "sentence": doubt.sentence},
        }

    def search(self, payload: bytes | None, *, like: str | None, k: int, skip: int) -> dict[str, Any]:
        """The images on places skip + 1 to skip + k. Raises ValueError for no image, KeyError for an unknown id."""
        wanted = min(skip + k, _MOST)
        with self._lock:
            pixels = (
                decode_image(payload or b"", upright=True) if like is None else self._pixels(self.live.record(like))
            )
            found = self.live.search(self._embedder.embed([pixels])[0], wanted + 1, without=like)
        return {
            "matches": [
                {"rank": rank, "score": score, "id": record.id, "class_name": record.class_name}
                for rank, (score, record) in enumerate(found[skip:wanted], start=skip + 1)
            ],
            "more": len(found) > wanted and wanted < _MOST,
        }

    def add(self, payload: bytes, *, id: str, class_name: str | None) -> None:
        """Add an image. Raises ValueError for no image, or an id that is taken."""
        pixels = decode_image(payload, upright=True)
        with self._lock:
            self.live.add(ImageRecord(id, class_name=class_name), self._embedder.embed([pixels])[0], payload)
            self.picture.cache_clear()

    def remove(self, id: str) -> None:
        """Remove an image. Raises KeyError for an unknown id."""
        with self._lock:
            self.live.remove(id)
            self.picture.cache_clear()

    def _picture(self, id: str) -> bytes:
        """A small JPEG. Raises KeyError for an unknown id, ValueError where the image is not at hand."""
        with self._lock:
            pixels_3hw = self._pixels(self.live.record(id))
        image = Image.fromarray(pixels_3hw.permute(1, 2, 0).contiguous().numpy())
        image.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        image.save(stream, "jpeg", quality=88)
        return stream.getvalue()

    def _pixels(self, record: ImageRecord) -> torch.Tensor:
        file = self.live.added_file(record.id)
        if file is not None:
            return read_image(file)
        if self._gallery is None:
            raise ValueError("the images of the index are not at hand; start again with --data")
        return self._gallery.image(record)


def build_app(service: Service, *, hosts: set[str] | None, can_change: bool) -> FastAPI:
    """The application.

    Args:
        service: answers the requests.
        hosts: the names that a request may call this machine by; None: any.
        can_change: whether images are added and removed.
    """
    app = FastAPI(title=f"dist_proxygml: {service.name}", docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        called, origin = _address(f"//{request.headers.get('host', '')}"), request.headers.get("origin")
        if called is None or (hosts is not None and called.hostname not in hosts):
            return JSONResponse({"detail": f"expected one of the hosts {', '.join(sorted(hosts or ()))}"}, 421)
        asking = None if origin is None else _address(origin)
        if origin is not None and (asking is None or asking.netloc != called.netloc):
            return JSONResponse({"detail": "expected a request of this page, got one of another site"}, 403)
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(render("serve.html", name=service.name, can_change=can_change))

    @app.get("/serve.css", include_in_schema=False)
    def styles() -> Response:
        return Response(render("serve.css", escape=str), media_type="text/css")

    @app.get("/serve.js", include_in_schema=False)
    def script() -> Response:
        return Response(render("serve.js", escape=str), media_type="text/javascript")

    @app.get("/api/index")
    def about() -> dict[str, Any]:
        return service.about() | {"can_change": can_change}

    @app.post("/api/search")
    async def search(
        request: Request,
        like: str | None = None,
        k: int = Query(24, ge=1, le=_MOST),
        skip: int = Query(0, ge=0, le=_MOST),
    ) -> dict[str, Any]:
        payload = None if like is not None else await _body(request)
        with _problems():
            return await run_in_threadpool(service.search, payload, like=like, k=k, skip=skip)

    @app.get("/api/image")
    def picture(id: str) -> Response:
        with _problems():
            return Response(service.picture(id), media_type="image/jpeg", headers={"Cache-Control": "no-cache"})

    if can_change:

        @app.post("/api/images", status_code=201)
        async def add(
            request: Request,
            id: str = Query(min_length=1, max_length=1000),
            class_name: str | None = Query(None, max_length=1000),
        ) -> dict[str, Any]:
            payload = await _body(request)
            with _problems():
                await run_in_threadpool(service.add, payload, id=id, class_name=class_name or None)
            return {"id": id}

        @app.delete("/api/images", status_code=204)
        def remove(id: str) -> None:
            with _problems():
                service.remove(id)

    return app


def _address(text: str) -> SplitResult | None:
    """The parts of an address; None where it is none, such as `[::1` without its end."""
    try:
        return urlsplit(text)
    except ValueError:
        return None


async def _body(request: Request) -> bytes:
    """The body, refused before it is all in memory if it is too long."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > MAX_UPLOAD:
            raise HTTPException(413, f"expected an image of at most {MAX_UPLOAD >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


@contextmanager
def _problems() -> Iterator[None]:
    """A user's mistakes as answers."""
    try:
        yield
    except KeyError as error:
        raise HTTPException(404, f"the index has no image {error.args[0]!r}") from None
    except ValueError as error:
        raise HTTPException(422, printable(error)) from None
    except OSError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        raise HTTPException(507, f"nothing was changed: {error.strerror}") from None


def changes_folder(index: Path) -> Path:
    """Where the changes of an index are kept unless said otherwise."""
    return index.with_name(f"{index.name}.changes")
