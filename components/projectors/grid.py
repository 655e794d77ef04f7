"""Rows and columns of an item's tokens, for the projectors that merge neighbours."""

from __future__ import annotations

from math import isqrt

from torch import Tensor


def sides(in_tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of an item: ``grid``, or those of a square.

    Raises:
        ValueError: the tokens are no square and no grid is given, or the grid has another number of cells.
    """
    if grid is not None:
        rows, columns = grid
        if rows < 1 or columns < 1 or rows * columns != in_tokens:
            raise ValueError(
                f"grid: {rows} x {columns} cells are not the {in_tokens} tokens of an item; correct it, or null for a square"
            )
        return rows, columns
    side = isqrt(in_tokens)
    if side * side != in_tokens:
        raise ValueError(
            f"grid: {in_tokens} tokens are no square (the one below is {side} x {side} = {side * side}); class and register tokens "
            "have no place in it: set them off in the encoder (prefix_tokens: false, select: patch), or give grid: [rows, columns]"
        )
    return side, side


def to_map(features: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens row by row to a feature map: [n, rows * columns, d] -> [n, d, rows, columns]"""
    return features.transpose(1, 2).unflatten(2, (rows, columns))


def to_tokens(maps: Tensor) -> Tensor:
    """A feature map to tokens row by row: [n, d, rows, columns] -> [n, rows * columns, d]"""
    return maps.flatten(2).transpose(1, 2)
