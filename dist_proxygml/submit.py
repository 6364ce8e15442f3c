"""Submit a training run: `python -m dist_proxygml.submit --help`. cluster/submit.py does it."""

import sys

from dist_proxygml.cluster.submit import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
