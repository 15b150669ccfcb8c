"""Map (source, stream, index) to a row of the dataset, for any index, in O(1).

A source is read in V streams, one per lane. Its draws are numbered: draw x of stream v has the
number g = x V + (V - 1 - v). Epoch e consists of the draws e N .. (e + 1) N - 1, so N consecutive
draws contain every row once.

In an epoch each stream has N / V of these numbers (rounded up or down). It reads the same number of
consecutive rows of the epoch's order, which begins at a random row. In this order, rows 0 .. N-1
are cut into P pieces of c neighbors (the last may be shorter); the pieces are shuffled, and so are
the rows in each piece. The end of a stream may cut a piece, which two streams then share.

# S sources  R requested rows  N rows of a source  P its pieces  V lanes
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from bridgework.data.plan.permutation import U64, derive, key_of, permute, side_of

_ONE = np.uint64(1)


@dataclass(frozen=True)
class _SourceLayout:
    """Parameters of one source in `LaneOrder`: a column of its table, all 64-bit."""

    rows: int
    piece: int  # rows per piece
    pieces: int
    full: int  # number of full pieces
    short: int  # rows of the last piece; `piece` if it is full
    full_side: int
    piece_side: int
    short_side: int
    order_key: int
    piece_key: int
    begin_key: int


def _layout(rows: int, group_rows: int, key: int, lanes: int) -> _SourceLayout:
    # at least four pieces per lane if the source is large enough, so that a lane reads many regions
    # of it per epoch
    piece = max(1, min(group_rows, rows // (4 * lanes)))
    full, rest = divmod(rows, piece)
    short = rest or piece
    sides = (side_of(full), side_of(piece), side_of(short))
    keys = (key_of(key, "order"), key_of(key, "piece"), key_of(key, "begin"))
    return _SourceLayout(rows, piece, full + (rest > 0), full, short, *sides, *keys)


class LaneOrder:
    """Order of the rows in the streams of all sources: O(1) memory per source, O(1) time per row.

    `rows`, `group_rows` and `keys` hold one number per source: its size, the number of neighbors
    that are read together, and a 64-bit key of its order.
    """

    def __init__(
        self, rows: Sequence[int], group_rows: Sequence[int], keys: Sequence[int], lanes: int
    ) -> None:
        sources = zip(rows, group_rows, keys, strict=True)
        layouts = [astuple(_layout(n, group, key, lanes)) for n, group, key in sources]
        self._lanes = np.uint64(lanes)
        self._table = np.array(layouts, dtype=np.uint64).T.copy()  # (fields of _SourceLayout, S)

    def locate(
        self,
        source_R: npt.NDArray[np.int64],
        stream_R: npt.NDArray[np.int64],
        index_R: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return (epoch_R, row_R) of row number `index_R`, from 0, in a stream of a source."""
        columns = self._table[:, source_R]
        n, piece, pieces, full, short, full_side, piece_side, short_side, *keys = columns
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
        """Return the place of a draw in the epoch's order.

        It is after the rows of all streams before its own.
        """
        first = epoch * n  # number of the first draw of the epoch
        start = np.where(  # of the stream's rows in this epoch
            first > turn, (first - np.minimum(turn, first) + self._lanes - _ONE) // self._lanes, 0
        )
        # number of streams that draw before this one in the epoch
        before = (turn + self._lanes - first % self._lanes) % self._lanes
        each, rest = np.divmod(n, self._lanes)
        place: U64 = before * each + np.minimum(before, rest) + (index - start)
        return place
