"""A Ray cluster on this machine alone, for tests and benchmarks."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Ray puts the machine's outer address in the place of 127.0.0.1, except where clusters are switched
# off, as they are on other systems; it reads this when it is imported.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


@contextlib.contextmanager
def loopback_cluster(nodes: int) -> Iterator[Any]:
    """Nodes of one CPU, which know each other by the loopback address alone."""
    import ray
    from ray.cluster_utils import Cluster

    scratch = tempfile.mkdtemp(prefix="ray-")  # pytest's own paths are too long for a socket
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", scratch)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        Path(scratch, "ray").mkdir()
        for left in (2, 1, 0):  # Ray gives a node half a minute, which a busy machine may take
            try:
                cluster = Cluster(True, head_node_args={**node, "include_dashboard": False})
                break
            except Exception:
                if not left:
                    raise
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)
