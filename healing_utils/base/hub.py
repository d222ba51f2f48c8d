"""Whether the Hugging Face hub can be asked at all."""

import socket
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from healing_utils.base.errors import HealingError


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
    address = hub.hostname, hub.port or {"http": 80}.get(hub.scheme, 443)
    for left in (2, 1, 0):
        try:
            return socket.create_connection(address, timeout=3).close()
        except OSError as error:
            if not left or time.monotonic() - start > 5:  # a name may have many addresses
                where = hub.hostname or constants.ENDPOINT
                raise HealingError(f"{where} cannot be reached ({error})") from error
            time.sleep(0.5)
