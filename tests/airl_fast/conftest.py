"""What every test of airl_fast runs under."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers whichever tests run, and in whichever order."""
    torch.manual_seed(0)
