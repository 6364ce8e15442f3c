"""Jobs on SLURM, and sweeps of settings and seeds."""
