"""Train every point of a grid with several seeds, as `python -m dist_proxygml.sweep`."""

import sys

from dist_proxygml.cluster.sweep import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
