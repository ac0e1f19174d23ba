"""Pictures larger than the model's images, or smaller, as tiles of that size, coded together."""

import numpy as np


def count_tiles(picture: tuple[int, int], tile: tuple[int, int]) -> int:
    """Returns how many tiles of (height, width) cover a picture of (height, width)."""
    return -(-picture[0] // tile[0]) * -(-picture[1] // tile[1])


def cut(picture: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Returns a picture [H, W, C] as tiles [G, h, w, C], row by row; its edge fills the last."""
    height, width, channels = picture.shape
    rows, columns = -(-height // tile[0]), -(-width // tile[1])
    more = (0, rows * tile[0] - height), (0, columns * tile[1] - width), (0, 0)
    whole = np.pad(picture, more, mode="edge")
    grid = whole.reshape(rows, tile[0], columns, tile[1], channels).swapaxes(1, 2)
    return grid.reshape(-1, *tile, channels)


def joined(tiles: np.ndarray, picture: tuple[int, int]) -> np.ndarray:
    """Returns the picture [H, W, C] of (height, width) that `cut` made tiles [G, h, w, C] of."""
    height, width, channels = tiles.shape[1:]
    rows, columns = -(-picture[0] // height), -(-picture[1] // width)
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    whole = grid.reshape(rows * height, columns * width, channels)
    return whole[: picture[0], : picture[1]]
