# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What holds for every test: no network, one thread, the same random numbers on each run."""

import os
from importlib.metadata import distributions


# Before anything imports the hub's client: what is not on disk does not exist.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings


pytest.register_assert_rewrite("support")

# The examples are the same on each run, and a slow machine fails no test.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# Where models and inputs are made, as in `PEFT_TEST_DEVICE=cuda pytest tests/products/test_methods.py`.
if "PEFT_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["PEFT_TEST_DEVICE"])
    torch.backends.cudnn.allow_tf32 = False

# The models are tiny: more threads cost more than they bring, and fight with the other worker.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Name the versions of the clients that tests/clients runs."""
    clients = ("transformers", "accelerate", "trl", "diffusers", "sentence-transformers")
    found = {distribution.name: distribution.version for distribution in distributions()}
    return "clients: " + ", ".join(f"{name}-{found.get(name, 'missing')}" for name in clients)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start each test from the same random numbers."""
    torch.manual_seed(0)
