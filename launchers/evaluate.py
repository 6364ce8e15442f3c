"""Evaluate a checkpoint, as `deepspeed --module dist_proxygml.evaluate`."""

from dist_proxygml.distributed.parallel import run_launcher
from dist_proxygml.evaluate import main

if __name__ == "__main__":
    run_launcher(main)
