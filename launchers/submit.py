"""Submit a training run to SLURM, as `python -m dist_proxygml.submit`."""

from dist_proxygml.cli import run_command
from dist_proxygml.submit import main

if __name__ == "__main__":
    run_command(main)
