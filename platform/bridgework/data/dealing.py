"""How the rows of a source are dealt to the lanes: the x-th row that a lane takes of a source, for any x, at once.

Rows 0 .. N-1 are cut into P pieces of c neighbours; the last may be shorter. Every epoch puts the pieces in a new
order, and they are dealt round the lanes without a break between epochs: place j of epoch e is global place
G = e P + j, goes to lane G % V, and is there the (G // V)-th piece. So a source of one row reaches every lane too.

The short piece would let the lane that holds it run ahead. Epoch e therefore deals it to lane e % V, at a place drawn
among that lane's own; the other pieces are permuted around it. In any V epochs from a multiple of V (a lap) each lane
then holds P pieces of which one is short, which is exactly N rows: lanes never drift apart, and the lap, the piece and
the row of any x are a few divisions.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from bridgework.data.permutation import U64, derive, key_of, permute, side_of

# S sources  R rows asked for  N rows of a source  P its pieces  V lanes

_ONE = np.uint64(1)


@dataclass(frozen=True)
class _Cut:
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
    short_key: int


def _cut(rows: int, group_rows: int, key: int, lanes: int) -> _Cut:
    # at least four pieces for every lane where the source has them: else a lane sees few places of it in an epoch
    piece = max(1, min(group_rows, rows // (4 * lanes)))
    full, rest = divmod(rows, piece)
    short = rest or piece
    sides = (side_of(full), side_of(piece), side_of(short))
    keys = (key_of(key, "order"), key_of(key, "piece"), key_of(key, "short"))
    return _Cut(rows, piece, full + (rest > 0), full, short, *sides, *keys)


class Deal:
    """The rows of all sources as the lanes take them: O(1) memory per source, O(1) time per row.

    `rows`, `group_rows` and `keys` hold one number per source: its size, how many neighbours are read together, and
    64 bits that name its order.
    """

    def __init__(self, rows: Sequence[int], group_rows: Sequence[int], keys: Sequence[int], lanes: int) -> None:
        cuts = [_cut(n, g, key, lanes) for n, g, key in zip(rows, group_rows, keys, strict=True)]
        self._lanes = np.uint64(lanes)
        self._table = np.array([astuple(cut) for cut in cuts], dtype=np.uint64).T.copy()  # (fields of _Cut, S)

    def locate(
        self, source_R: npt.NDArray[np.int64], lane: int, index_R: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """(epoch_R, row_R) of the `index`-th row, counted from 0, that `lane` takes of each source."""
        n, piece, pieces, full, short, full_side, piece_side, short_side, *keys = self._table[:, source_R]
        order_key, piece_key, short_key = keys
        lap, at = np.divmod(index_R.astype(np.uint64), n)
        epoch = lap * self._lanes + np.uint64(lane)  # the one of the lap that deals its short piece to this lane
        gap = (epoch * pieces + self._short_place(epoch, pieces, short_key)) // self._lanes - lap * pieces
        at += np.where(at >= gap * piece + short, piece - short, 0)
        turn, within = np.divmod(at, piece)
        epoch, place = np.divmod((lap * pieces + turn) * self._lanes + np.uint64(lane), pieces)

        gap = np.where(short < piece, self._short_place(epoch, pieces, short_key), pieces)
        last = place == gap
        place = np.minimum(place - (place > gap), full - _ONE)
        drawn = permute(place, full, full_side, derive(order_key, epoch))
        which = np.where(last, full, drawn)
        size, side = np.where(last, short, piece), np.where(last, short_side, piece_side)
        row = which * piece + permute(within, size, side, derive(piece_key, epoch * pieces + which))
        return epoch.astype(np.int32), row.astype(np.int64)

    def _short_place(self, epoch: U64, pieces: U64, key: U64) -> U64:
        """A place of lane `epoch % V` in that epoch; means nothing for a source that has no short piece."""
        first = (self._lanes - epoch * (pieces - _ONE) % self._lanes) % self._lanes
        turns = np.maximum((pieces + self._lanes - _ONE - first) // self._lanes, _ONE)
        return first + derive(key, epoch) % turns * self._lanes
