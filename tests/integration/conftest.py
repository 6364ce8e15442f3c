"""What several files of tests share: one SLURM for all of them, since it takes seconds to start, and a browser.

The browser is Debian's Chromium, driven by Playwright, which brings none of its own. With DIST_PROXYGML_NEEDS_BROWSER
set, as in CI, none is a failure.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.slurm_jobs import Slurm, running_slurm

# Quiet: of itself the browser asks nobody for anything.
ARGUMENTS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running SLURM of three nodes, each a host of its own."""
    with running_slurm() as cluster:
        yield cluster


@pytest.fixture(scope="module")  # Playwright's event loop runs meanwhile, and would hinder other files' tests of loops
def browser() -> Iterator[Any]:
    program = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    if program is None:
        reason = "NOTHING IS OPENED IN A BROWSER: no chromium; `apt-get install chromium` installs it (Debian)"
        if "DIST_PROXYGML_NEEDS_BROWSER" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=ARGUMENTS, chromium_sandbox=False)
        yield started
        started.close()
