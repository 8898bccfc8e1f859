"""Tests run tiny tensors: one thread each is faster than two that wait for one another."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
# A shell starts its background jobs with Ctrl-C ignored, and so would everything that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
