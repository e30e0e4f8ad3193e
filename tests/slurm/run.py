"""`make test-slurm`: install Slurm where it is missing, start a cluster, run the tests of this folder, end the cluster.

Further arguments go to pytest. Asks for CI=true or --yes, since it installs packages and starts daemons.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT))

from tests.slurm.cluster import Cluster, ClusterError, end_on_signals  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    """Returns pytest's exit code, 2 where nothing could be tested."""
    rest = [argument for argument in arguments if argument != "--yes"]
    if os.environ.get("CI") != "true" and "--yes" not in arguments:
        print(
            "error: test-slurm installs Debian's slurm-wlm and munge where they are missing and starts a cluster on "
            "loopback for some minutes; say so with: make test-slurm YES=1 (or CI=true)",
            file=sys.stderr,
        )
        return 2
    if subprocess.run([PROJECT / "tests/slurm/install.sh"], check=False).returncode:
        return 2
    end_on_signals()
    with tempfile.TemporaryDirectory(prefix="surgstage-slurm-") as folder:
        try:
            with Cluster(Path(folder)) as cluster:
                return _run_pytest(cluster, rest)
        except ClusterError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


def _run_pytest(cluster: Cluster, arguments: Sequence[str]) -> int:
    print(cluster.call("sinfo", "--version").stdout.strip(), "on loopback, state in", cluster.folder, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/slurm", "-v", *arguments],
        cwd=PROJECT,
        env={**os.environ, **cluster.environment, "SURGSTAGE_TEST_CLUSTER": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        kept = PROJECT / "artifacts/slurm-tests.log"  # pytest's line stays the last
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(cluster.logs())
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
