"""Tiles inside a model against transformers' LLaVA-NeXT, and token counts."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, unpad_image

from bridgework.errors import DataError
from bridgework.models import tiles
from bridgework.system import Layout

SIDE = 4
GRIDS = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3))  # columns, rows
LAYOUTS = [
    Layout(2, 2, 64, 64),
    Layout(2, 1, 100, 40),
    Layout(1, 2, 30, 97),
    Layout(3, 1, 90, 20),
    Layout(1, 3, 11, 60),
]


def squares(layout: Layout, width: int = 6, seed: int = 0) -> Tensor:
    count = 1 + layout.columns * layout.rows
    return torch.randn(count, SIDE**2, width, generator=torch.Generator().manual_seed(seed))


def packed_by_transformers(tokens_SPD: Tensor, layout: Layout, newline_D: Tensor) -> Tensor:
    pinpoints = [
        [rows * SIDE * 14, columns * SIDE * 14] for columns, rows in [(layout.columns, layout.rows)]
    ]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=SIDE * 14, patch_size=14),
        image_grid_pinpoints=pinpoints,
    )
    sizes = torch.tensor([[layout.height, layout.width]])
    features, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [tokens_SPD], sizes, "default", newline_D
    )
    packed: Tensor = features[0]
    return packed


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_unpadded_rows_with_newlines_are_those_of_transformers(layout: Layout) -> None:
    module, tokens_SPD = tiles.Unpad(6), squares(layout)
    ours = module(tokens_SPD, torch.tensor([layout]))
    assert torch.equal(ours, packed_by_transformers(tokens_SPD, layout, module.newline))
    assert len(ours) == tiles.num_image_tokens(layout, SIDE**2, "unpad")


def test_images_follow_each_other_and_one_without_tiles_is_its_base_square() -> None:
    module, layouts = tiles.Unpad(6), [LAYOUTS[1], Layout(0, 0, 50, 50), LAYOUTS[4]]
    each = [squares(layout, seed=i) for i, layout in enumerate(layouts)]
    together = module(torch.cat(each), torch.tensor(layouts))
    alone = [module(own, torch.tensor([layout])) for own, layout in zip(each, layouts, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(alone[1], each[1][0])


@given(st.sampled_from(GRIDS), st.integers(1, 3000), st.integers(1, 3000))
def test_unpadded_ranges_match_transformers(grid: tuple[int, int], width: int, height: int) -> None:
    layout = Layout(*grid, width, height)
    rows, columns = tiles.unpadded(layout, 24)
    theirs = unpad_image(torch.zeros(1, grid[1] * 24, grid[0] * 24), (height, width))
    assert (1, len(rows), len(columns)) == tuple(theirs.shape)


@pytest.mark.parametrize(("columns", "rows"), GRIDS)
def test_merge_and_split_undo_each_other(columns: int, rows: int) -> None:
    tiles_SPD = squares(Layout(columns, rows, 1, 1))[1:]
    grid_RCD = tiles.merge(tiles_SPD, rows, columns)
    assert grid_RCD.shape == (rows * SIDE, columns * SIDE, 6)
    assert torch.equal(tiles.split(grid_RCD, rows, columns), tiles_SPD)
    assert torch.equal(grid_RCD[:SIDE, :SIDE].flatten(0, 1), tiles_SPD[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_mask_is_true_on_the_patches_that_are_kept(layout: Layout) -> None:
    real_SP = tiles.patch_mask(torch.tensor([layout]), SIDE**2)
    rows, columns = tiles.unpadded(layout, SIDE)
    assert real_SP.shape == (1 + layout.columns * layout.rows, SIDE**2) and real_SP[0].all()
    grid_RC = tiles.merge(real_SP[1:].unsqueeze(-1), layout.rows, layout.columns).squeeze(-1)
    assert grid_RC[rows.start : rows.stop, columns.start : columns.stop].all()
    assert int(grid_RC.sum()) == len(rows) * len(columns)


def test_llava_next_counts_576_and_its_rows_with_newlines() -> None:
    assert tiles.num_image_tokens(Layout(2, 2, 672, 672), 576, "unpad") == 576 + 48 * 49
    assert tiles.num_image_tokens(Layout(2, 1, 640, 240), 576, "unpad") == 576 + 18 * 49
    assert tiles.num_image_tokens(Layout(0, 0, 640, 240), 576, "unpad") == 576


@pytest.mark.parametrize(
    ("grid", "tokens"), [((0, 0), 128), ((1, 2), 384), ((3, 1), 512), ((2, 2), 640)]
)
def test_xgen_counts_128_a_square_whatever_the_image(grid: tuple[int, int], tokens: int) -> None:
    assert tiles.num_image_tokens(Layout(*grid, 1, 1), 128, "resample") == tiles.num_image_tokens(
        Layout(*grid, 9, 7), 128, "resample"
    )
    assert tiles.num_image_tokens(Layout(*grid, 1, 1), 128, "resample") == tokens


def test_a_batch_without_images_gives_no_token_and_a_gradient_of_zero() -> None:
    module = tiles.Unpad(6)
    tokens_0D = module(torch.zeros(0, SIDE**2, 6), None)
    assert tokens_0D.shape == (0, 6)
    tokens_0D.sum().backward()
    assert module.newline.grad is not None and not module.newline.grad.any()


def test_layouts_of_other_squares_are_refused() -> None:
    with pytest.raises(DataError, match="layouts are of 5 squares, and 4 are given"):
        tiles.Unpad(6)(torch.zeros(4, SIDE**2, 6), torch.tensor([[2, 2, 9, 9]]))
