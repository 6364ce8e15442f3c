"""Tests of dist_proxygml; a package, so that ranks in other processes import them by name."""
