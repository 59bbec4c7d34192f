"""Serves the labelling page until it is stopped."""

from __future__ import annotations

import uvicorn

from trueup.label.app import LabelConfig, make_app
from trueup.store import Store


def serve(place: str, config: LabelConfig) -> None:
    """Prints each rater's link, or where to sign in, and serves. An answer that was acknowledged is on the disk: the
    server may be killed at any time."""
    store = Store(place)
    app = make_app(store, config)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,  # a printed link's token is part of an address
            server_header=False,
            proxy_headers=config.proxy,
            forwarded_allow_ips="127.0.0.1",
            ssl_certfile=config.certificate,
            ssl_keyfile=config.key,
        )
    )
    socket = server.config.bind_socket()
    host, port = socket.getsockname()[:2]
    scheme = "https" if config.certificate else "http"
    where = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    for rater, link in app.state.links.items():
        print(f"{rater}: {where}{link}", flush=True)
    if not app.state.links:
        print(f"sign in at {', '.join(f'https://{n}' for n in config.names) or where}", flush=True)
    print("stop with Ctrl-C", flush=True)
    server.run(sockets=[socket])
    store.close()
