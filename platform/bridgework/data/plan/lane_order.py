"""Map (source, stream, index) to a row of the dataset, for any index, in O(1).

A source is read in V streams, one for each lane. Its draws have a number: the x-th of stream v is
g = x V + (V - 1 - v). Epoch e is the draws e N .. (e + 1) N - 1, so N draws in a row are every row
once.

In an epoch each stream has N / V of these numbers (rounded up or down), and reads as many rows on
end of the epoch's own order, which begins at a drawn row: rows 0 .. N-1 are cut into P pieces of c
neighbors (the last may be shorter), in a drawn order, their rows permuted inside. The end of a
stream may cut a piece; then two streams read of it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from bridgework.data.plan.permutation import U64, derive, key_of, permute, side_of

# S sources  R rows asked for  N rows of a source  P its pieces  V lanes

_ONE = np.uint64(1)


@dataclass(frozen=True)
class _SourceLayout:
    """One source as `Deal` needs it: all sixty-four bit, one row of a table."""

    rows: int
    piece: int  # rows of a piece
    pieces: int
    full: int  # pieces that are not short
    short: int  # rows of the last piece, `piece` if none is short
    full_side: int
    piece_side: int
    short_side: int
    order_key: int
    piece_key: int
    begin_key: int


def _cut(rows: int, group_rows: int, key: int, lanes: int) -> _SourceLayout:
    # at least four pieces for every lane where the source has them: else a lane sees few places of it in an epoch
    piece = max(1, min(group_rows, rows // (4 * lanes)))
    full, rest = divmod(rows, piece)
    short = rest or piece
    sides = (side_of(full), side_of(piece), side_of(short))
    keys = (key_of(key, "order"), key_of(key, "piece"), key_of(key, "begin"))
    return _SourceLayout(rows, piece, full + (rest > 0), full, short, *sides, *keys)


class LaneOrder:
    """The rows of all sources as their streams take them: O(1) memory per source, O(1) time per row.

    `rows`, `group_rows` and `keys` hold one number per source: its size, how many neighbors are read together, and
    64 bits that name its order.
    """

    def __init__(
        self, rows: Sequence[int], group_rows: Sequence[int], keys: Sequence[int], lanes: int
    ) -> None:
        cuts = [_cut(n, g, key, lanes) for n, g, key in zip(rows, group_rows, keys, strict=True)]
        self._lanes = np.uint64(lanes)
        self._table = np.array(
            [astuple(cut) for cut in cuts], dtype=np.uint64
        ).T.copy()  # (fields of _Cut, S)

    def locate(
        self,
        source_R: npt.NDArray[np.int64],
        stream_R: npt.NDArray[np.int64],
        index_R: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """(epoch_R, row_R) of the `index`-th row, counted from 0, of each stream of a source."""
        n, piece, pieces, full, short, full_side, piece_side, short_side, *keys = self._table[
            :, source_R
        ]
        order_key, piece_key, begin_key = keys
        turn = self._lanes - _ONE - stream_R.astype(np.uint64)
        epoch = (index_R.astype(np.uint64) * self._lanes + turn) // n
        place = self._place(index_R.astype(np.uint64), turn, epoch, n)
        place = (place + derive(begin_key, epoch) % n) % n
        at, within = np.divmod(place, piece)
        last = at == full
        drawn = permute(np.minimum(at, full - _ONE), full, full_side, derive(order_key, epoch))
        which = np.where(last, full, drawn)
        size, side = np.where(last, short, piece), np.where(last, short_side, piece_side)
        row = which * piece + permute(within, size, side, derive(piece_key, epoch * pieces + which))
        return epoch.astype(np.int32), row.astype(np.int64)

    def _place(self, index: U64, turn: U64, epoch: U64, n: U64) -> U64:
        """Place of a draw in the epoch's order: after what the streams before its own have of it."""
        first = epoch * n  # the epoch's first draw
        begun = np.where(
            first > turn, (first - np.minimum(turn, first) + self._lanes - _ONE) // self._lanes, 0
        )
        before = (
            turn + self._lanes - first % self._lanes
        ) % self._lanes  # streams that draw before this one in it
        each, rest = np.divmod(n, self._lanes)
        place: U64 = before * each + np.minimum(before, rest) + (index - begun)
        return place
