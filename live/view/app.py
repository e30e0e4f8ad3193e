"""The requests of the page, and the answers. Videos, rows and files are addressed by number, never by a path."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from features.annotation_files.intervals import VideoAnnotations
from interop.annotations import FORMATS, converted_texts
from live.view.following import Follower
from live.view.labels import Conflict, LabelFolder, Labels, interval_json, intervals_of
from live.view.rows import OfVideos, Row, Source, all_rows, classes_used, interval_rows, spec_classes
from live.view.videos import Video

PAGE = Path(__file__).resolve().parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_LIVE_S = 0.4  # between two looks at the file that is followed
_MOST_DIGITS = 9


@dataclass(frozen=True)
class Durations:
    """The mean duration in seconds of each class of a track in a run's training videos."""

    run: str
    track: str
    mean_s: dict[str, float]


@dataclass
class Material:
    """What was opened: videos, their sources of rows, the folder of labels and whose labels are made."""

    videos: list[Video]
    sources: list[Source] = field(default_factory=list)
    labels: LabelFolder | None = None
    annotator: str | None = None
    spec: DataSetSpec | None = None
    durations: list[Durations] = field(default_factory=list)
    live: Path | None = None
    _rows: dict[int, list[Row]] = field(default_factory=dict)

    def video(self, number: int) -> Video:
        """Return a video by its number. Raises UserError if there is none."""
        if not 0 <= number < len(self.videos):
            raise UserError(f"there is no video {number}; {len(self.videos)} are open")
        return self.videos[number]

    def rows(self, number: int) -> list[Row]:
        """Return the rows of a video, which the page shows above and below the labels."""
        if number not in self._rows:
            self._rows[number] = all_rows(self.sources, self.video(number).entry)
        return self._rows[number]

    @property
    def tracks(self) -> dict[str, list[str]]:
        """The classes of each track: those of the data set, of the sources and of all labels in the folder."""
        found: dict[str, dict[str, None]] = {}
        given = [spec_classes(self.spec)] if self.spec else []
        given += [source.classes() for source in self.sources]
        for video in self.videos if self.labels else ():
            try:
                given.append(classes_used(self._labels_of(video).intervals))
            except UserError:
                continue  # reported when that video is opened
        for classes in given:
            for track, names in classes.items():
                found.setdefault(track, {}).update(dict.fromkeys(names))
        return {track: list(names) for track, names in found.items()}

    def _labels_of(self, video: Video) -> Labels:
        return self.labels.read(video.id) if self.labels else Labels("")


class Answers:
    """The functions that answer requests about some material."""

    def __init__(self, material: Material) -> None:
        self._of = material
        self.stopping = False

    def state(self, request: Request) -> Response:
        """What was opened."""
        of = self._of
        return JSONResponse({
            "videos": [video.id for video in of.videos],
            "tracks": of.tracks,
            "background": list(of.spec.background) if of.spec else [],
            "annotator": of.annotator,
            "can_save": of.labels is not None,
            "folder": str(of.labels.folder) if of.labels else None,
            "formats": sorted(FORMATS),
            "durations": [vars(one) for one in of.durations],
            "live": of.live.name if of.live else None,
        })  # fmt: skip

    def video(self, request: Request) -> Response:
        """One video: its frames' times and its rows."""
        number = _number(request, "video")
        video = self._of.video(number)
        about = {"id": video.id, "number": number, "timing": video.timing.to_json()}
        media = video.media
        rows = [row.to_json() for row in self._of.rows(number)]
        return JSONResponse(about | {"media": media[1] if media else None, "rows": rows})

    def frame(self, request: Request) -> Response:
        """One frame of a video."""
        picture = self._of.video(_number(request, "video")).jpeg(_number(request, "frame"))
        return Response(picture, media_type="image/jpeg")

    def media(self, request: Request) -> Response:
        """The file of a video, or the range of it that the browser asks for."""
        found = self._of.video(_number(request, "video")).media
        if found is None:
            raise UserError("this video is no file that a browser can play")
        return FileResponse(found[0], media_type=found[1])

    def values(self, request: Request) -> Response:
        """The probabilities of a row, as bytes."""
        rows, number = self._of.rows(_number(request, "video")), _number(request, "row")
        if number >= len(rows):
            raise UserError(f"there is no row {number}")
        return Response(rows[number].value_bytes(), media_type="application/octet-stream")

    def labels(self, request: Request) -> Response:
        """The labels of a video: one's own, and those of others as rows."""
        video = self._of.video(_number(request, "video"))
        return JSONResponse(self._shown(self._folder().read(video.id)))

    async def save(self, request: Request) -> Response:
        """Replace one's own labels of a video, unless they have been changed elsewhere."""
        video, folder, who = self._of.video(_number(request, "video")), self._folder(), self._of.annotator
        try:
            given = json.loads(await request.body())
            base, intervals = given["state"], given["intervals"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError("labels: expected an object with state and intervals") from error
        own = intervals_of(intervals, who)
        return JSONResponse(self._shown(await run_in_threadpool(folder.save, video.id, str(base), who, own)))

    def history(self, request: Request) -> Response:
        """The earlier states of one's own labels of a video, newest first; a state that occurs again only once."""
        video, who = self._of.video(_number(request, "video")), self._of.annotator
        found: dict[str, dict[str, Any]] = {}
        for entry in reversed(self._folder().history(video.id)):
            own = [interval_json(one) for one in entry["intervals"] if one.annotator == who]
            found.setdefault(json.dumps(own), {"saved": entry["saved"], "intervals": own})
        return JSONResponse(list(found.values())[:200])

    def export(self, request: Request) -> Response:
        """Labels in a format of `annotations convert`, of one video or of all that have some, as a file or a ZIP."""
        target, which = request.query_params.get("format", ""), request.query_params.get("video", "all")
        if target not in FORMATS:
            raise UserError(f"format: expected one of {', '.join(FORMATS)}")
        videos = self._of.videos if which == "all" else [self._of.video(_as_number(which, "video"))]
        texts = self._exported(videos, target)
        name, content = next(iter(texts.items()))
        if len(texts) > 1:
            name, content = f"labels-{target}.zip", _zipped(texts)
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{_quoted(name)}"}
        return Response(content, media_type="application/octet-stream", headers=headers)

    def _exported(self, videos: list[Video], target: str) -> dict[str, bytes]:
        folder, who = self._folder(), self._of.annotator
        found = []
        for video in videos:
            if own := folder.read(video.id).of(who):
                media = str(video.path.resolve()) if video.entry.kind == "video" else None
                found.append(VideoAnnotations(video.id, tuple(own), video.entry.fps, media))
        if not found:
            raise UserError("there are no labels to export yet")
        ask = OfVideos(target, spec=self._of.spec, videos=tuple(videos))
        _, texts = converted_texts(found, Path("labels"), ask, {})
        return {name: text.encode() for name, text in texts.items()}

    def _folder(self) -> LabelFolder:
        if self._of.labels is None:
            raise UserError("labels cannot be saved: start `view` with --labels DIR")
        return self._of.labels

    def _shown(self, labels: Labels) -> dict[str, Any]:
        who = self._of.annotator
        name = "labels" if who is None else "others"
        others = [row.to_json() for row in interval_rows(name, labels.of_others(who))]
        return {"state": labels.state, "own": [interval_json(one) for one in labels.of(who)], "others": others}

    async def live(self, request: Request) -> Response:
        """What `stream` writes, as server-sent events."""
        if self._of.live is None:
            raise UserError("no file is followed: start `view` with --live FILE")
        follower = Follower(self._of.live)
        return StreamingResponse(self._events(request, follower), media_type="text/event-stream")

    async def _events(self, request: Request, follower: Follower) -> AsyncIterator[bytes]:
        yield b"retry: 1000\n\n"
        while not self.stopping and not await request.is_disconnected():
            news = await anyio.to_thread.run_sync(follower.read)
            if news is None:
                await anyio.sleep(_LIVE_S)
                continue
            yield b"data: " + json.dumps(news.to_json(), separators=(",", ":")).encode() + b"\n\n"


def build_app(material: Material) -> tuple[Starlette, Answers]:
    """Return the application, without the guard of `access`, and its answers, which are told when the server stops."""
    answers = Answers(material)
    files = {one.name: one for one in PAGE.iterdir() if one.suffix in _TYPES}

    def page_file(request: Request) -> Response:
        found = files.get(request.path_params.get("name", "index.html"))
        if found is None:
            return JSONResponse({"error": "no such page"}, 404)
        return Response(found.read_bytes(), media_type=_TYPES[found.suffix])

    one = "/api/videos/{video}"
    gets: dict[str, Callable[[Request], Any]] = {
        "/": page_file,
        "/page/{name}": page_file,
        "/api/state": answers.state,
        one: answers.video,
        f"{one}/frames/{{frame}}": answers.frame,
        f"{one}/media": answers.media,
        f"{one}/rows/{{row}}": answers.values,
        f"{one}/labels": answers.labels,
        f"{one}/history": answers.history,
        "/api/export": answers.export,
        "/api/live": answers.live,
    }
    routes = [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
    routes.append(Route(f"{one}/labels", answers.save, methods=["PUT"]))
    handlers: Any = {UserError: _refused, Conflict: partial(_conflict, answers)}
    return Starlette(routes=routes, exception_handlers=handlers), answers


def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


def _conflict(answers: Answers, request: Request, error: Exception) -> Response:
    assert isinstance(error, Conflict)
    return JSONResponse({"error": str(error), "current": answers._shown(error.current)}, 409)


def _number(request: Request, name: str) -> int:
    return _as_number(request.path_params[name], name)


def _as_number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise UserError(f"{name}: expected a number")
    return int(text)


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def _zipped(texts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in texts.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
