"""Collating: padding, masks, and images in the order of their places."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bridgework.data.collate import Row, collate
from bridgework.system import IGNORE, IMAGE


def row(place: int, ids: list[int], images: NDArray[Any]) -> Row:
    labels = [IGNORE if i == IMAGE else i for i in ids]
    return Row(
        step=0,
        place=place,
        key=f"k{place}",
        source=place % 2,
        ids=ids,
        labels=labels,
        images=images,
    )


def squares(*values: int) -> NDArray[np.uint8]:
    return (
        np.stack([np.full((3, 4, 4), v, np.uint8) for v in values])
        if values
        else np.zeros((0, 3, 4, 4), np.uint8)
    )


ROWS = [
    row(0, [IMAGE, 5, 6], squares(1)),
    row(1, [7], squares()),
    row(2, [IMAGE, IMAGE, 8, 9], squares(2, 3)),
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_removing_the_padding_returns_the_rows(side: Literal["right", "left"]) -> None:
    batch = collate(ROWS, pad_id=0, side=side)
    for i, one in enumerate(ROWS):
        keep = batch.attention_BT[i]
        assert batch.ids_BT[i][keep].tolist() == one.ids
        assert batch.labels_BT[i][keep].tolist() == one.labels
        assert set(batch.ids_BT[i][~keep].tolist()) <= {0} and set(
            batch.labels_BT[i][~keep].tolist()
        ) <= {IGNORE}
    edge = 0 if side == "right" else -1
    assert batch.attention_BT[:, edge].all()


def test_images_are_concatenated_in_the_order_of_their_places() -> None:
    batch = collate(ROWS, pad_id=0)
    assert batch.pixels_N3HW is not None and batch.pixels_N3HW.dtype == torch.uint8
    assert batch.pixels_N3HW[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_batch_without_images_has_pixels_of_no_images() -> None:
    batch = collate([ROWS[1]], pad_id=0)
    assert batch.pixels_N3HW is not None and batch.pixels_N3HW.shape == (0, 3, 4, 4)
    assert batch.inputs().keys() == {"ids", "attention", "labels", "pixels"}


def test_cached_features_replace_pixels() -> None:
    batch = collate([row(0, [IMAGE, 5], np.ones((1, 2, 8), np.float16))], pad_id=0)
    assert batch.inputs().keys() == {"ids", "attention", "labels", "features"}
    assert batch.features_NPD is not None and batch.features_NPD.shape == (1, 2, 8)


def test_all_tensors_of_a_batch_move_to_a_device() -> None:
    moved = collate(ROWS, pad_id=0).to("meta")
    assert {t.device.type for t in moved.inputs().values()} == {"meta"}
    assert moved.keys == ["k0", "k1", "k2"] and moved.sources == [0, 1, 0]
