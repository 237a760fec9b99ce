"""Shared by all tests: an environment that finds no GPU and no hub, and helper modules beside the tests that use them."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

TESTS = Path(__file__).parent
for folder in (TESTS, TESTS / "data"):
    sys.path.insert(0, str(folder))
