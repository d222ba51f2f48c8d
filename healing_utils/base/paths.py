"""Where things lie. Writers and readers of a run's folder both ask here."""

import os
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from healing_utils.base.errors import HealingError
from healing_utils.base.records import digest


def file_name(name: str) -> str:
    """`name` as a file may be called: of a path in it the last part, and a short hash where it had
    to be changed, as two names may become one."""
    last = re.sub(r"^([^/\\_]*_)?.*[/\\]", r"\1", name)  # after a prefix: healed_owner/name
    plain = re.sub(r"[^\w.-]+", "-", last)[-60:]
    return name if plain == name else f"{plain}-{digest(name)[:6]}"


def project_root() -> Path:
    """The checkout that the package lies in, or the caller's folder for an installed package."""
    here = Path(__file__).resolve().parents[2]
    return here if (here / "pyproject.toml").is_file() else Path.cwd()


def run_folder(run: str | Path) -> Path:
    """The absolute folder of a run. A relative one lies below the caller's folder, as every path
    that a person gives; but the project's own, ``data/runs/NAME`` and ``data/results/NAME``, lie in
    the checkout whoever asks from where, and the former in the folder `HEALING_RUNS` where that is
    set, as tests and shared machines do."""
    run = Path(os.path.expanduser(run))  # which leaves a ~ that means nothing here
    elsewhere = os.environ.get("HEALING_RUNS")
    if elsewhere and run.parts[:2] == ("data", "runs"):
        return Path(os.path.expanduser(elsewhere)).resolve().joinpath(*run.parts[2:])
    own = run.parts[:2] in (("data", "runs"), ("data", "results"))
    return project_root() / run if own else Path.cwd() / run


def reach_hub(kind: str, name: str, *kept: Path) -> None:
    """Raise HealingError where the ``datasets`` or ``models`` called `name` are neither in the
    hub's cache, or `kept` in another, nor can the hub be reached: its library would try for half a
    minute. Three connections may fail, as those of a flaky network do; downloads have the library's
    own tries. Through a proxy nothing is asked."""
    from huggingface_hub import constants

    cached = [Path(constants.HF_HUB_CACHE, "--".join([kind, *name.split("/")])), *kept]
    proxies = getproxies().keys() - {"no"}
    if constants.HF_HUB_OFFLINE or proxies or any(map(Path.exists, cached)):
        return
    hub, start = urlsplit(constants.ENDPOINT), time.monotonic()
    for left in (2, 1, 0):
        try:
            where = hub.hostname, hub.port or {"http": 80}.get(hub.scheme, 443)
            return socket.create_connection(where, timeout=3).close()
        except OSError as error:
            if not left or time.monotonic() - start > 5:  # a name may have many addresses
                where = hub.hostname or constants.ENDPOINT
                raise HealingError(f"{where} cannot be reached ({error})") from error
            time.sleep(0.5)


def shown_folder(folder: Path) -> str:
    """A run's folder for people: what lies in the checkout by its place there, so that notebooks
    read alike everywhere, else its absolute path."""
    root = project_root()
    inside = root in folder.parents
    return f"{folder.relative_to(root)} in the project's folder" if inside else str(folder)
