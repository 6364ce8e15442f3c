"""Submit a training run to SLURM, as `python -m dist_proxygml.submit`."""

import sys

from dist_proxygml.cluster.submit import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
