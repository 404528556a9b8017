"""The uniform numbers that samples are drawn with: one stream a call of the sampler, wherever it is read from."""

import torch

_BLOCK = 1 << 16  # numbers drawn at once: the stream must not depend on who asks for how many


class Uniform:
    """f32 numbers in 0..1 on a device, a function of the seed alone."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._ahead = torch.empty(0, device=device)

    def ahead(self, count: int) -> torch.Tensor:
        """The next `count` numbers, [count], which stay the next ones."""
        missing = count - len(self._ahead)
        if missing > 0:
            blocks = [
                torch.rand(_BLOCK, device=self._ahead.device, generator=self._generator)
                for _ in range(-(-missing // _BLOCK))
            ]
            self._ahead = torch.cat([self._ahead, *blocks])
        return self._ahead[:count]

    def skip(self, count: int) -> None:
        """Numbers that were looked `ahead` at are used."""
        self._ahead = self._ahead[count:]

    def next(self, count: int) -> torch.Tensor:
        numbers = self.ahead(count)
        self.skip(count)
        return numbers
