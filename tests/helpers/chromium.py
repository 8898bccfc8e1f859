"""The Chromium of this machine, without a window; tests that need it are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def launched() -> Iterator[Any]:
    """A browser of playwright's."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(NAMES)})")
    unconfined = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root otherwise
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=unconfined)
        yield browser
        browser.close()


def pixels(page: Any) -> np.ndarray:
    """What is on the screen, uint8 [height, width, RGB]."""
    return np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB"))
