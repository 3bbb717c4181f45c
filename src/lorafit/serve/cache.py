"""Keys and values of a running batch: written in place, row by row replaceable, and as wide as the longest row.

transformers' own growing cache copies all of itself for each token. Here a layer has more columns than are in use, and
a token's keys and values are written into the next one. All rows end at the same column, `stop`; the longest begins at
`start`, shorter ones later, and what is left of a row's beginning is masked::

    room     0 . . . start . . . . . . . . stop . . room
    row 0              k k k k k k k k k k k
    row 1                    k k k k k k k k
    row 2                              k k k

A row that leaves gives its place to the last one. When the longest leaves, `start` moves on, and what lies before it is
dead until the cache is moved: into new tensors, of the size that is needed then. That happens when the columns or rows
do not suffice, so each token pays for a copy of two columns at the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SPARE = 64
"""Columns of room beyond what is needed, at the least."""


@dataclass
class Extent:
    """What of the tensors is in use; all layers of a cache have the same."""

    rows: int = 0
    start: int = 0
    stop: int = 0
    row_room: int = 0
    column_room: int = 0

    @property
    def columns(self) -> int:
        """Those in use."""
        return self.stop - self.start


@final
class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer, (row room, heads, column room, width).

    Args:
        extent: what is in use, shared with the other layers.
        window: of a sliding window; such a layer keeps all columns, too, but shows only those that queries can see.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, extent: Extent, window: int | None) -> None:
        super().__init__()
        self._extent = extent
        self._window = window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the tensors, of zeros: what is masked is multiplied by 0, and must not be NaN."""
        self.keys, self.values = self._blank(key_states), self._blank(value_states)
        self.is_initialized = True

    def _blank(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(self._extent.row_room, heads, self._extent.column_room, width)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the columns after `stop`, and returns views of all that the queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        extent, more = self._extent, key_states.shape[2]
        stop = extent.stop + more
        self.keys[: extent.rows, :, extent.stop : stop] = key_states
        self.values[: extent.rows, :, extent.stop : stop] = value_states
        seen, _ = self.get_mask_sizes(more)
        return self.keys[: extent.rows, :, stop - seen : stop], self.values[: extent.rows, :, stop - seen : stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns `update` shows, and how many there are before them."""
        columns = self._extent.columns + query_length
        seen = columns if self._window is None else min(columns, self._window - 1 + query_length)
        return seen, columns - seen

    def get_seq_length(self) -> int:
        """The columns in use."""
        return self._extent.columns

    def get_max_length(self) -> int:
        """No limit, as transformers says it."""
        return -1

    def pairs(self, other: RowLayer) -> tuple[tuple[Tensor, Tensor], ...]:
        """Own tensors beside those of the same layer of another cache; none where that has none."""
        if not other.is_initialized:
            return ()
        if not self.is_initialized:
            self.lazy_initialization(other.keys, other.values)
        return (self.keys, other.keys), (self.values, other.values)

    def moved(self, before: Extent) -> None:
        """Takes tensors of the extent as it is now, with what was in use before in them."""
        if self.is_initialized:
            self.keys = self._copied(self.keys, before)
            self.values = self._copied(self.values, before)

    def _copied(self, old: Tensor, before: Extent) -> Tensor:
        made, new = self._blank(old), self._extent
        made[: new.rows, :, new.start : new.stop] = old[: new.rows, :, before.start : before.stop]
        return made

    def replaced(self, row: int, by: int) -> None:
        """Copies one row over another."""
        if self.is_initialized and row != by:
            live = slice(self._extent.start, self._extent.stop)
            for tensor in (self.keys, self.values):
                tensor[row, :, live] = tensor[by, :, live]


@final
class RowCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """The cache of a batch, for transformers' models.

    Before a forward pass, `reserve` the columns that it writes; after it, `advance` by them: a pass that fails in
    between leaves the cache as it was.

    Args:
        windows: for each layer the width of its sliding window, or None.
        rows: how many there are from the start.
        columns: room for so many from the start.
    """

    def __init__(self, windows: Sequence[int | None], *, rows: int = 0, columns: int = 0) -> None:
        self._extent = Extent(rows=rows, row_room=rows, column_room=columns)
        self._windows = tuple(windows)
        super().__init__(layers=[RowLayer(self._extent, window) for window in self._windows])

    @property
    def rows(self) -> int:
        """How many there are."""
        return self._extent.rows

    @property
    def columns(self) -> int:
        """Those in use: the length of the longest row, or more after it has left, until `narrow`."""
        return self._extent.columns

    @property
    def nbytes(self) -> int:
        """What the tensors take, with the room in them."""
        made = [layer for layer in self.layers if layer.is_initialized]
        return sum(tensor.numel() * tensor.element_size() for layer in made for tensor in (layer.keys, layer.values))

    def reserve(self, more: int) -> None:
        """Makes room for so many columns after the last."""
        extent = self._extent
        if extent.stop + more <= extent.column_room:
            return
        self._move(start=0, rows=_room(extent.rows, extent.row_room), spare=more + max(SPARE, extent.columns // 2))

    def advance(self, more: int) -> None:
        """So many columns have been written."""
        self._extent.stop += more

    def narrow(self, columns: int) -> None:
        """No row has more than these columns."""
        extent = self._extent
        extent.start = max(extent.start, extent.stop - columns)

    def drop(self, row: int) -> None:
        """A row leaves, and the last one takes its place."""
        last = self._extent.rows - 1
        for layer in self.layers:
            layer.replaced(row, by=last)
        self._extent.rows = last

    def take_in(self, other: RowCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Appends rows of another cache.

        Args:
            other: a cache of the same model.
            rows: which of its rows.
            lengths: how many columns each of them has in use; they are its last ones.
        """
        self._make_room(len(rows), max(lengths))
        extent, end = self._extent, other._extent.stop
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for to, given in mine.pairs(theirs):
                for place, (row, length) in enumerate(zip(rows, lengths, strict=True), start=extent.rows):
                    # What a row before this one left behind is masked, but NaN times 0 is NaN.
                    to[place, :, : extent.stop - length] = 0
                    to[place, :, extent.stop - length : extent.stop] = given[row, :, end - length : end]
        extent.rows += len(rows)

    def _make_room(self, rows: int, columns: int) -> None:
        """For so many more rows, of which the longest has so many columns."""
        extent = self._extent
        rows += extent.rows
        if extent.rows == 0:
            extent.start = extent.stop = 0
        if rows > extent.row_room or extent.stop < columns:
            wide = max(extent.columns, columns)
            room = max(rows, 2 * extent.row_room) if rows > extent.row_room else _room(rows, extent.row_room)
            self._move(start=wide - extent.columns, rows=room, spare=max(SPARE, wide // 2))
        extent.start = min(extent.start, extent.stop - columns)

    def _move(self, *, start: int, rows: int, spare: int) -> None:
        """Into tensors with room for so many rows and `spare` columns after the last; the first one is at `start`."""
        extent = self._extent
        before = Extent(start=extent.start, stop=extent.stop)
        extent.start, extent.stop = start, start + before.columns
        extent.row_room, extent.column_room = rows, extent.stop + spare
        for layer in self.layers:  # one after the other: never two copies of the whole
            layer.moved(before)


def _room(rows: int, room: int) -> int:
    """Room for rows when the tensors are made anew anyway: half of what there was is given up when it stands empty."""
    return max(rows, min(room, 2 * rows))
