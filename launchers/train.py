"""Train a model, as `deepspeed --module dist_proxygml.train`."""

from dist_proxygml.distributed.parallel import run_launcher
from dist_proxygml.train import main

if __name__ == "__main__":
    run_launcher(main)
