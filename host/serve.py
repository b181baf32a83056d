"""The command `python3 run.py [serve]`: the node editor in the browser, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import errno
import importlib.util
import signal
import webbrowser
from pathlib import Path

from aiohttp import web

from . import previews, terminal
from .arguments import Parser, host_name, port_number
from .connections import Runner
from .files import Folders, SaveError
from .guard import is_loopback
from .registry import Registry
from .server import Server


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of `python3 run.py [serve]`."""
    parser = Parser("run.py serve", description="Serve the node editor and open it in the browser.")
    parser.add_argument("--port", type=port_number, default=8188, help="port of the editor (default: 8188)")
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    parser.add_argument(
        "--allow-host",
        type=host_name,
        action="append",
        default=[],
        metavar="NAME",
        help="a further name under which browsers reach the editor, such as a proxy's; may be repeated",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_models()
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the images (default: data/output)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="images, uploads, workflows and settings (default: data)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Serve the editor until Ctrl-C; returns the exit code."""
    args = parse(argv)
    try:
        folders = Folders.under(args.data, args.output, tuple(args.models))
        with previews.owned(folders.temp):
            asyncio.run(_serve(Server(Registry.of_pack(folders), find_frontend()), args))
    except SaveError as error:
        _print(str(error))
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def find_frontend() -> Path:
    """The static files in the installed frontend wheel. Raises SaveError when it is not installed."""
    found = importlib.util.find_spec("comfyui_frontend_package")
    if found is None or found.origin is None:
        raise SaveError("the package comfyui-frontend-package is not installed; start with python3 run.py")
    return Path(found.origin).parent / "static"


async def _serve(server: Server, args: argparse.Namespace) -> None:
    """Serve until a signal arrives. Raises SaveError when the address is not available."""
    app = server.app(is_loopback(args.listen), [args.listen, *args.allow_host])
    runner = Runner(app, access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.TCPSite(runner, args.listen, args.port).start()
    except OSError as error:
        await runner.cleanup()
        reason = f"cannot listen on {args.listen}: {error.strerror or error}; choose another --listen"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = f"port {args.port} is in use; stop the other program, or choose another --port"
        raise SaveError(reason) from error
    address = _address(args.listen, runner.addresses[0][1])
    _announce(address, args.listen)
    stop = _stop_event()
    if not args.no_browser:
        asyncio.get_running_loop().run_in_executor(None, webbrowser.open, address)
    try:
        await stop.wait()
    finally:
        await runner.cleanup()


def _address(listen: str, port: int) -> str:
    """The editor's URL for a browser on this machine."""
    name = "127.0.0.1" if listen in ("0.0.0.0", "::") else listen
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"


def _announce(address: str, listen: str) -> None:
    _print(f"Rectiflux is at {address}  (Ctrl-C stops it)")
    if not is_loopback(listen):
        _print(
            "WARNING: every machine that can reach this one can use the editor. There is no password: anyone "
            "can run workflows, view and overwrite images, and fill the disk."
        )


def _stop_event() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM"):
        try:
            loop.add_signal_handler(getattr(signal, name), stop.set)
        except NotImplementedError:  # Windows: Ctrl-C raises KeyboardInterrupt instead
            break
    return stop


def _print(message: str) -> None:
    terminal.report(f"{message}\n")
