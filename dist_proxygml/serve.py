"""Search in a browser: `python -m dist_proxygml.serve --index indexes/photos`, then open http://localhost:8000.

Images are embedded on this machine and go nowhere else. Added and removed images are kept beside the index, which
itself stays as it is.
"""

import argparse
import socket
import sys
from contextlib import closing
from pathlib import Path

from dist_proxygml.cli import add_options, at_least, build_parser, command, printable, run_command

EXAMPLES = """\
  python -m dist_proxygml.serve --index indexes/photos
  python -m dist_proxygml.serve --index indexes/photos --run runs/mine --data photos --port 0
  python -m dist_proxygml.serve --index indexes/photos --host 0.0.0.0 --read-only
"""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("serve", "Serve a page to search an index on, by dropping an image on it.", EXAMPLES)
    add_options(parser, "--index")
    add_options(
        parser, "--run", required=False, help="run, checkpoint or export with the model (default: where it was)"
    )
    add_options(parser, "--data", help="where the images of the index lie now (default: where they were)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, only this machine)"
    )
    parser.add_argument("--port", type=at_least(0), default=8000, help="port, 0 for any that is free (default: 8000)")
    parser.add_argument("--read-only", action="store_true", help="search only: no image is added or removed")
    parser.add_argument(
        "--changes", type=Path, metavar="DIR", help="where added and removed images are kept (default: INDEX.changes)"
    )
    add_options(parser, "--device")
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    if given.host not in _LOOPBACK and not given.read_only:
        raise ValueError(
            f"expected --read-only with --host {given.host}: whoever reaches this machine could add and remove images; "
            "add it, or listen at 127.0.0.1"
        )
    try:
        import uvicorn

        from dist_proxygml.inference.server import Service, build_app, changes_folder
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; `pip install 'dist_proxygml[serve]'` installs what serves pages") from None
    from dist_proxygml.inference.live_index import LiveIndex
    from dist_proxygml.inference.retrieval_index import Index
    from dist_proxygml.inference.search import open_gallery, open_model

    with _listen(given.host, given.port) as listening:
        index = Index.load(given.index)
        with closing(LiveIndex(index, given.index, given.changes or changes_folder(given.index))) as live:
            for note in live.notes:
                print(printable(note), file=sys.stderr)
            embedder = open_model(index, given.index, run=given.run, device=given.device)
            service = Service(live, embedder, open_gallery(index, given.data), name=given.index.name)
            hosts = _LOOPBACK if given.host in _LOOPBACK else None
            app = build_app(service, hosts=hosts, can_change=not given.read_only)
            host, port = listening.getsockname()[:2]
            address = f"[{host}]" if ":" in host else host
            print(f"search {len(live):,} images at http://{address}:{port} (Ctrl-C ends it)", flush=True)
            uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen at {host}:{port}: {error}; name another --port, 0 takes any free one"
        ) from None


if __name__ == "__main__":
    run_command(main)
