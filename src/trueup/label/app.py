"""The labelling pages: FastAPI, rendered at the server, usable without script.

    /enter?token=   the printed link: signs a local rater in          /sign-in, /sign-out   accounts
    /label          the next comparison; POST /label/N keeps it       /undo  /feedback/N  /guideline
    /manage         progress, agreement, disputes (managers)          /log  /export  /pause  /adjudicate/N

Every page is sent with a Content-Security-Policy that lets nothing in but our own style and script; every request that
changes something must come from our own pages with the session's token.
"""

import ipaddress
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from trueup.config import Config
from trueup.label.accounts import Accounts, Session, TooMany
from trueup.label.files import FORMATS, export_lines
from trueup.label.manager import manager_view, recent_log
from trueup.label.queue import GRADES, Answer, Nothing, Queue, Rules, Task, side
from trueup.label.text import render
from trueup.records import UserError
from trueup.store import Store

HERE = Path(__file__).parent
MANY_RATERS = 20
"""So many sessions may come from one address, such as an office's, before the rate of the address binds."""
LARGEST = 256 * 1024
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer a form would come with Origin: null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
CHOICES = (
    (3, "1", "A is much better"),
    (2, "2", "A is better"),
    (1, "3", "A is slightly better"),
    (0, "4", "Tie"),
    (-1, "5", "B is slightly better"),
    (-2, "6", "B is better"),
    (-3, "7", "B is much better"),
    ("bad", "0", "Both are bad"),
)
FLAGS = (
    ("false", "says what is false"),
    ("harmful", "is harmful"),
    ("evasive", "evades the question"),
    ("repetitive", "repeats itself"),
    ("unreadable", "cannot be read"),
)
REASONS = ("I cannot judge this", "The question makes no sense", "I do not want to read this", "Something else")
GUIDELINE = """Prefer the answer that a careful, honest expert would rather have given.

1. **Does it do what was asked?** An answer to another question is no answer.
2. **Is it true?** A short right answer beats a long one with a mistake in it. Look it up where you can.
3. **Is it harmless?** Of two that help equally, prefer the one that could hurt nobody. Refusing what is harmless is a
   fault, too; so is preaching.
4. **Is it clear, and no longer than it has to be?** Length alone is worth nothing.

*Tie* means that both are as good as each other. *Both are bad* means that you would give neither to anybody.
Where you are unsure, say so by the grade: slightly. If you cannot judge it at all, skip it."""


class LabelConfig(Config):
    """The labelling page."""

    host: str = "127.0.0.1"
    """Where it listens. Anything but this machine needs accounts with passwords, and https."""
    port: int = Field(8000, ge=0, lt=65536)
    """0 for any that is free."""
    raters: tuple[str, ...] = ("me",)
    """On this machine: who gets a link of their own; the first one is the manager."""
    simulated: bool = False
    """The raters of this machine are programs, and their answers are marked as simulated for ever."""
    guideline: str | None = None
    """A Markdown file for the raters, instead of the built-in guideline."""
    certificate: str | None = None
    key: str | None = None
    """Files for https."""
    proxy: bool = False
    """A proxy on this machine speaks https to the raters, and plain http to this server."""
    names: tuple[str, ...] = ()
    """Names under which the raters' browsers reach the page, such as label.example.org."""
    per_minute: int = Field(600, ge=1)
    """Requests a minute of one session: people are slower, a runaway script is not."""
    rules: Rules = Rules()
    """How comparisons are handed out."""

    @property
    def local(self) -> bool:
        return self.host == "localhost" or _is_loopback(self.host)

    @property
    def https(self) -> bool:
        return self.certificate is not None or self.proxy


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class SignIn(Exception):
    """Nobody is signed in."""


def session_of(request: Request) -> Session:
    """Who is signed in, by the cookie. Raises SignIn."""
    state = request.app.state
    session: Session | None = state.accounts.session(request.cookies.get(state.cookie))
    if session is None:
        raise SignIn
    return session


Signed = Annotated[Session, Depends(session_of)]


def manager_of(session: Signed) -> Session:
    if session.role != "manager":
        raise HTTPException(403, "This page is for managers.")
    return session


async def form_of(request: Request, session: Signed) -> FormData:
    """The form, once its token has shown that it is ours."""
    form = await request.form(max_files=0, max_fields=100)
    if not session.allows(_text(form, "csrf")):
        raise HTTPException(403, "The form was not sent from this page, or is of an earlier sign-in.")
    return form


Manager = Annotated[Session, Depends(manager_of)]
Sent = Annotated[FormData, Depends(form_of)]


LARGEST_ID = 2**31 - 1
"""Of a row, in PostgreSQL; a larger number in an address names nothing."""
Id = Annotated[int, InPath(ge=0, le=LARGEST_ID)]
Asked = Annotated[int, Query(ge=0, le=LARGEST_ID)]


def make_app(store: Store, config: LabelConfig, *, clock: Callable[[], float] = time.time) -> FastAPI:
    """The app; `app.state.links` holds the path of each local rater's link. Raises UserError where the page would be
    open to others without accounts or without https."""
    accounts = Accounts(store, clock)
    _check(config, accounts)
    queue = Queue(store, config.rules, clock)
    guideline = render(_guideline(config.guideline))
    links: dict[str, str] = {}
    if config.local and not config.proxy:
        for rater, role in zip(config.raters, ["manager"] + ["rater"] * len(config.raters), strict=False):
            known = next((r for r in accounts.all() if r.name == rater), None)
            kind = "simulated" if config.simulated else "human"
            if known is not None and known.kind != kind:
                other = f"{rater}-{'program' if config.simulated else 'human'}"
                raise UserError(
                    f"rater '{rater}' is {known.kind} in this store, and its answers say so for ever: they cannot be "
                    f"{kind} from now on. Give who labels now a name of its own: raters=[{other}, ...]"
                )
            if known is None or known.role != role:
                accounts.add(rater, role=role, kind=kind, sensitive=bool(known and known.sensitive))
            links[secrets.token_urlsafe(32)] = rater
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.links = {rater: f"/enter?token={token}" for token, rater in links.items()}
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    app.middleware("http")(Guard(config, clock))
    cookie = "__Host-trueup" if config.https else "trueup"  # a browser takes the first only over https
    app.state.accounts, app.state.cookie = accounts, cookie
    pages = Environment(
        loader=FileSystemLoader(HERE / "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )

    def page(name: str, session: Session | None = None, status: int = 200, **values: Any) -> HTMLResponse:
        values = {"said": "", "here": "", **values}
        return HTMLResponse(pages.get_template(name).render(session=session, **values), status)

    def signed_in(token: str) -> Response:
        """To the first page: a manager of others is lent no comparison unasked."""
        session = accounts.session(token)
        manages = session is not None and session.role == "manager" and len(links) != 1
        response = RedirectResponse("/manage" if manages else "/label", 303)
        response.set_cookie(
            cookie,
            token,
            httponly=True,
            samesite="strict",
            secure=config.https,
            path="/",
            max_age=int(accounts.days * 86400),
        )
        return response

    @app.exception_handler(SignIn)
    def to_sign_in(request: Request, error: SignIn) -> Response:
        return RedirectResponse("/sign-in", 303)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        heading = {403: "Not allowed", 404: "Not found"}.get(error.status_code, "That did not work")
        return page("message.html", status=error.status_code, heading=heading, text=error.detail, undo=False)

    @app.exception_handler(RequestValidationError)
    def nowhere(request: Request, error: RequestValidationError) -> Response:
        return page("message.html", status=404, heading="Not found", text="There is no such page.", undo=False)

    @app.exception_handler(UserError)
    def told(request: Request, error: UserError) -> Response:
        return page("message.html", status=400, heading="That did not work", text=str(error), undo=False)

    @app.get("/")
    def home() -> Response:
        return RedirectResponse("/label", 303)

    @app.get("/enter")
    def enter(token: str = "") -> Response:
        for known, rater in links.items():
            if secrets.compare_digest(known.encode(), token.encode()):
                return signed_in(accounts.open(rater))
        raise HTTPException(403, "This link is not valid, or of a server that has been stopped since.")

    @app.get("/sign-in")
    def ask_sign_in() -> Response:
        return page("sign-in.html", wrong="", accounts=any(r.password for r in accounts.all()))

    @app.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        form = await request.form(max_files=0, max_fields=10)
        address = request.client.host if request.client else ""
        try:
            name, password = _text(form, "name"), _text(form, "password")
            token = await run_in_threadpool(accounts.sign_in, name, password, address)
        except TooMany:
            return page(
                "sign-in.html", status=429, wrong="Too many failed sign-ins: wait a quarter of an hour.", accounts=True
            )
        if token is None:
            return page("sign-in.html", status=403, wrong="Name and password do not go together.", accounts=True)
        return signed_in(token)

    @app.post("/sign-out")
    def sign_out(session: Signed, form: Sent) -> Response:
        accounts.end(session)
        response = RedirectResponse("/sign-in", 303)
        response.delete_cookie(cookie, path="/", secure=config.https, httponly=True, samesite="strict")
        return response

    @app.get("/label")
    def label(session: Signed, again: Asked = 0, said: str = "") -> Response:
        found = queue.undo(session.rater) if again else queue.next(session.rater)
        if found is None or (again and isinstance(found, Task) and found.assignment != again):
            return RedirectResponse("/label", 303)
        words = SAID.get(said, "")
        if isinstance(found, Nothing):
            heading, text = NOTHING[found.why]
            undo = queue.undo(session.rater) is not None
            text = f"{text} {found.note}"
            return page("message.html", session, here="label", heading=heading, text=text, undo=undo, said=words)
        return page("label.html", session, here="label", said=words, **question(session, found, again=bool(again)))

    def question(session: Session, task: Task, *, again: bool) -> dict[str, Any]:
        previous, sides = task.previous, task.comparison.completions
        chosen: Any = None
        flags: list[list[str]] = [[], []]
        if previous:
            shown = 1 - previous.p if task.swapped else previous.p
            chosen = "bad" if previous.both_bad else round((previous.strength or 0) * GRADES) * side(shown)
            flags = list(previous.meta.get("flags", flags))
            flags = flags[::-1] if task.swapped else flags
        return {
            "task": task,
            "messages": _messages(task),
            "left": render(task.left),
            "right": render(task.right),
            "left_cut": not sides[task.swapped].ended,
            "right_cut": not sides[not task.swapped].ended,
            "grades": CHOICES,
            "chosen": chosen,
            "flags": flags,
            "flag_words": FLAGS,
            "reasons": REASONS,
            "can_skip": task.purpose != "onboarding",
            "progress": queue.progress(session.rater),
            "onboarding": queue.onboarding(session.rater) if task.purpose == "onboarding" else None,
            "previous": previous,
            "correcting": (previous.id if previous else -1) if again else None,
            "guideline": guideline,
        }

    @app.post("/label/{assignment}")
    def keep(assignment: Id, session: Signed, form: Sent) -> Response:
        corrects = _number(form, "corrects")
        if _text(form, "do") == "skip":
            reason = _text(form, "reason")[:200]
            said: str = queue.skip(assignment, session.rater, reason, flag=bool(_text(form, "flag")), corrects=corrects)
            return RedirectResponse("/label?said=" + ("skipped" if said == "kept" else said), 303)
        grade = _text(form, "grade")
        if grade not in {str(g) for g, _, _ in CHOICES}:
            raise HTTPException(400, "No choice was made.")
        known = [value for value, _ in FLAGS]
        answer = Answer(
            grade=0 if grade == "bad" else int(grade),
            both_bad=grade == "bad",
            flags=tuple(tuple(v for v in known if v in form.getlist(n)) for n in ("flag_left", "flag_right")),  # type: ignore[arg-type]
            note=_text(form, "note")[:4000],
            own=_text(form, "own")[:20_000],
            seconds=_seconds(form),
        )
        said = queue.submit(assignment, session.rater, answer, corrects=corrects)
        if said == "kept" and queue.feedback(assignment, session.rater):
            return RedirectResponse(f"/feedback/{assignment}", 303)
        return RedirectResponse(f"/label?said={said}", 303)

    @app.post("/undo")
    def undo(session: Signed, form: Sent) -> Response:
        last = queue.undo(session.rater)
        return RedirectResponse(f"/label?again={last.assignment}" if last else "/label?said=no-undo", 303)

    @app.get("/feedback/{assignment}")
    def feedback(assignment: Id, session: Signed) -> Response:
        found = queue.feedback(assignment, session.rater)
        if found is None:
            return RedirectResponse("/label", 303)
        task, p, gold, why = found
        return page(
            "feedback.html",
            session,
            here="label",
            right=side(p) == side(gold),
            said_words=_words(p, task),
            gold_words=_words(gold, task),
            why=render(why),
            messages=_messages(task),
            left=render(task.left),
            right_text=render(task.right),
        )

    @app.get("/guideline")
    def show_guideline(session: Signed) -> Response:
        return page("guideline.html", session, guideline=guideline)

    @app.get("/manage")
    def manage(session: Manager, said: str = "") -> Response:
        view = manager_view(store, clock())
        return page(
            "manage.html", session, here="manage", said=SAID.get(said, ""), render=render, choices=CHOICES, **view
        )

    @app.post("/pause")
    def pause(session: Manager, form: Sent) -> Response:
        with store.writing() as db:
            queue.pause(db, session.rater, _text(form, "rater"), _text(form, "why")[:200])
        return RedirectResponse("/manage?said=done", 303)

    @app.post("/adjudicate/{item}")
    def adjudicate(item: Id, session: Manager, form: Sent) -> Response:
        grade = _text(form, "grade")
        if grade not in {str(g) for g, _, _ in CHOICES}:
            raise HTTPException(400, "No choice was made.")
        answer = Answer(0 if grade == "bad" else int(grade), grade == "bad", note=_text(form, "note")[:4000])
        queue.adjudicate(item, session.rater, answer)
        return RedirectResponse("/manage?said=adjudicated", 303)

    @app.get("/log")
    def show_log(session: Manager, before: Asked = 0) -> Response:
        return page("log.html", session, here="log", rows=recent_log(store, before))

    @app.get("/export")
    def export(session: Manager, what: str = "labels") -> Response:
        if what not in FORMATS:
            raise HTTPException(404, f"There is no export '{what}'.")
        with store.writing() as db:
            store.note(db, session.rater, "exported", format=what)
        named = {"Content-Disposition": f'attachment; filename="{what}.jsonl"'}
        return StreamingResponse(export_lines(store, what), media_type="application/jsonl", headers=named)

    return app


SAID = {
    "kept": "Kept.",
    "corrected": "Corrected.",
    "again": "That had been kept before; nothing has changed.",
    "late": "That took longer than the item was yours, and another rater has it now: your answer was not counted.",
    "skipped": "Skipped: it goes to another rater.",
    "no-undo": "There is nothing to undo.",
    "done": "Done.",
    "adjudicated": "Kept: the item is closed.",
}
NOTHING = {
    "done": ("Nothing to label now", "Every comparison is answered, or with another rater at the moment."),
    "paused": ("You are paused", "Please ask who runs the labelling. The reason:"),
    "cap": ("That was your share", "You have answered as many comparisons as one rater may. Thank you."),
}


class Guard:
    """Before each request: is it of a name that is ours, small enough, from our own pages, not one of too many. After
    it: the headers that keep a page's content harmless."""

    def __init__(self, config: LabelConfig, clock: Callable[[], float]) -> None:
        self.hosts = {"127.0.0.1", "localhost", "[::1]", *config.names} | ({config.host} if not config.names else set())
        self.clock, self.minute = clock, 0
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.https, self.most = config.https, config.per_minute

    async def __call__(self, request: Request, go: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = self.refusal(request)
        response = Response(refusal[1], refusal[0], media_type="text/plain") if refusal else await go(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        if self.https:
            response.headers["Strict-Transport-Security"] = "max-age=31536000"
        return response

    def refusal(self, request: Request) -> tuple[int, str] | None:
        host = request.headers.get("host", "")
        if urlsplit(f"//{host}").hostname not in {h.strip("[]") for h in self.hosts}:
            return 421, "This server is not known by that name (key 'names')."
        address = request.client.host if request.client else ""
        cookie = next((v for k, v in request.cookies.items() if k.endswith("trueup")), "")
        with self.lock:
            if (minute := int(self.clock() // 60)) != self.minute:
                self.minute, self.seen = minute, Counter()
            for who, most in ((f"at {address}", MANY_RATERS * self.most), (cookie or "nobody", self.most)):
                self.seen[who] += 1
                if self.seen[who] > most:
                    return 429, "Too many requests: wait a minute."
        if request.method in ("GET", "HEAD"):
            return None
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            return 413, f"A form has at most {LARGEST} bytes, and says how many."
        origin = request.headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "The form was sent from another site."
        return None


def _check(config: LabelConfig, accounts: Accounts) -> None:
    if bool(config.certificate) != bool(config.key):
        raise UserError("https needs both keys, certificate and key")
    if config.local and not config.proxy:
        return
    if not config.https:
        raise UserError(
            f"host={config.host} is open to other machines: passwords and cookies need https: certificate=FILE "
            "key=FILE, or proxy=true where a proxy on this machine does it"
        )
    if not any(r.password and r.role == "manager" for r in accounts.all()):
        raise UserError(
            f"host={config.host} is open to other machines, and needs accounts: first trueup store account STORE NAME "
            "--role manager"
        )


def _guideline(path: str | None) -> str:
    if path is None:
        return GUIDELINE
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the guideline cannot be read: {error}") from None


def _messages(task: Task) -> list[dict[str, Any]]:
    return [
        {"role": m["role"], "html": render(m["content"]), "text": m["content"]} for m in task.comparison.prompt.messages
    ]


def _words(p: float, task: Task) -> str:
    shown = side(1 - p if task.swapped else p)
    return {1: "A is better", 0: "neither is better", -1: "B is better"}[shown]


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    if isinstance(value, str) and "\0" in value:  # PostgreSQL cannot hold it, and nobody types it
        raise HTTPException(400, "A text here holds the character U+0000.")
    return value if isinstance(value, str) else ""


def _number(form: FormData, name: str) -> int | None:
    text = _text(form, name)
    return int(text) if text.isdecimal() and len(text) < 18 else None


def _seconds(form: FormData) -> float | None:
    try:
        seconds = float(_text(form, "seconds"))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 86400 else None
