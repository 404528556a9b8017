"""A KV cache of fixed size, of which a decoding step sees a corner: its first rows and their first places.

Every view of it has the addresses that the whole has, so a captured step stays valid, and rows that have ended are
closed up by moving the others down. transformers' StaticCache has one batch size and always shows all of its places.
"""

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicCache


class StaticKeys:
    """keys, values: a tensor a layer, [rows, Hkv, places, D], zero where nothing was written: what is masked must be
    finite. column: int64 [1], on the device: the place that the next token of every row is written to."""

    def __init__(self, like: DynamicCache, rows: int, places: int) -> None:
        first = like.layers[0].keys
        self.rows, self.places = rows, places
        self.column = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.keys = [_empty(layer.keys, rows, places) for layer in like.layers]
        self.values = [_empty(layer.values, rows, places) for layer in like.layers]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def fill(self, read: DynamicCache, source: torch.Tensor) -> None:
        """Put prompts into the first places of the first rows: row i gets that of `source[i]`, int64 [R]."""
        width = read.layers[0].keys.shape[2]
        for layer, keys, values in zip(read.layers, self.keys, self.values, strict=True):
            keys[: len(source), :, :width] = layer.keys[source]
            values[: len(source), :, :width] = layer.values[source]
        self.column.fill_(width)

    def close_up(self, keep: torch.Tensor, used: int) -> None:
        """Row i becomes what row `keep[i]`, int64 [R], was, as far as its first `used` places."""
        for tensor in (*self.keys, *self.values):
            tensor[: len(keep), :, :used] = tensor[keep, :, :used]

    def corner(self, rows: int, places: int) -> Cache:
        """The first rows and places as transformers' models write and read them, a token a row."""
        parts = zip(self.keys, self.values, strict=True)
        return Cache(layers=[_Corner(k[:rows, :, :places], v[:rows, :, :places], self.column) for k, v in parts])


def row_bytes(like: DynamicCache, places: int) -> int:
    """What one row of so many places takes."""
    return sum(
        t[0, :, 0].numel() * t.element_size() * places for layer in like.layers for t in (layer.keys, layer.values)
    )


class _Corner(CacheLayerMixin):
    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column = keys, values, column
        self.is_initialized = True

    is_sliding = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """[R, Hkv, 1, D] of one more token each. Returns all places, also those that no token has reached."""
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        raise RuntimeError("a model asked the cache how long it is; its positions are given")

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def _empty(like: torch.Tensor, rows: int, places: int) -> torch.Tensor:
    return like.new_zeros(rows, like.shape[1], places, like.shape[3])
