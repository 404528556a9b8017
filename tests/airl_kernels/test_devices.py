"""Which device is current while kernels are launched: that of the tensors. No GPU needed, and none is used."""

import pytest
import torch
from airl_kernels import _common
from airl_kernels._common import DEFINED
from airl_kernels.testing import INTERPRETED
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about what surrounds the kernels")


class Device:
    """Stands in for the CUDA runtime's notion of the current device."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.index = device.index

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.index

    def __exit__(self, *_: object) -> None:
        Device.current = self.before


class Launchers:
    """Every launcher: tells which device is current. `fail`: raises in place of returning."""

    fail = False

    def __getattr__(self, name: str):
        def launch(*_: object) -> tuple[str, int]:
            if self.fail:
                raise RuntimeError("out of memory")
            return name, Device.current

        return launch


@pytest.fixture
def launchers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", Device)
    found = Launchers()
    monkeypatch.setattr(_common, "triton_kernels", lambda _: found)
    return found


def on(index: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory on cuda:index."""
    with FakeTensorMode():
        return torch.empty(3, device=f"cuda:{index}", dtype=dtype)


@pytest.mark.parametrize("name", DEFINED)
def test_kernels_are_launched_on_the_device_of_the_tensors(name, launchers):
    _, on_cuda = DEFINED[name]
    assert on_cuda(on(1), on(1), None, 0.5) == (name, 1)
    assert on_cuda([on(2), on(2)], on(2)) == (name, 2)
    assert Device.current == 0


def test_the_device_is_given_back_when_a_launch_fails(launchers):
    launchers.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        DEFINED["gae"][1](on(1))
    assert Device.current == 0


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize("other", ["cuda:0", "cpu"])
def test_tensors_on_several_devices_are_one_sentence(other, name, launchers):
    stray = torch.zeros(3) if other == "cpu" else on(0)
    for arguments in ((on(1), None, stray), ([on(1), stray], on(1))):
        with pytest.raises(ValueError) as caught:
            DEFINED[name][1](*arguments)
        places = " and ".join(sorted((other, "cuda:1")))
        assert str(caught.value) == f"{name} got tensors on {places}; move all of them to one device."
