"""Train every point of a grid with several seeds, as `python -m dist_proxygml.sweep`."""

from dist_proxygml.cli import run_command
from dist_proxygml.sweep import main

if __name__ == "__main__":
    run_command(main)
