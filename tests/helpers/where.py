"""Where tests of the engine compute: `WP_TEST_DEVICE=cuda` runs them on a GPU, references stay on the CPU."""

import os

DEVICE = os.environ.get("WP_TEST_DEVICE", "cpu")
