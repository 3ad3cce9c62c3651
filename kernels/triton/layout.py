"""How quantized weights lie on the device: the fields of blocks in planes of their own.

A row is [plane 0 of all blocks][plane 1 of all blocks] ..., as many bytes as in the file, and zeros
up to a whole number of 16 bytes:

    Q4_0    q4             d 2
    Q4_1    q4             d 2, m 2
    Q8_0    q8             d 2
    Q4_K    q4             d 2, dmin 2, scales and minima 12
    Q5_K    q4    q1       as Q4_K
    Q6_K    q4    q2       scales 16    d 2

The blocks of all other types lie as in the file.

Quants lie in tiles of so many sub-blocks, of elements with one scale, that an element of all
sub-blocks together is 16 bits: those of element 0 of sub-blocks 0, 1, ..., lowest bits
first, then those of element 1, and so on. One mask then takes two elements of one sub-block out of
32 bits, and neighbouring elements lie beside each other in every tile, as they do in the other
factor of a product. A last tile of fewer sub-blocks is shorter in the same way: its elements are
nearer to each other. q1 has 16 bits for elements i and i + 16 of the eight sub-blocks of a block.
"""

from __future__ import annotations

import torch

from fwdllm.kernels.types import BLOCKS, QuantType

# A vector load; rows begin at multiples of it.
ALIGNMENT = 16


def has_blocks(type: QuantType) -> bool:
    """Whether rows of a type are laid out here: all but those of single numbers."""
    return BLOCKS[type][0] > 1


def aligned(row_bytes: int) -> int:
    """Bytes of a row that is laid out, whose blocks have ``row_bytes``."""
    return row_bytes + -row_bytes % ALIGNMENT


def in_planes(data: torch.Tensor, type: QuantType) -> torch.Tensor:
    """Rows of blocks as in a file, uint8 [n, row_bytes], laid out: uint8 [n, multiple of 16]."""
    n, row_bytes = data.shape
    blocks = data.view(n, -1, BLOCKS[type][1])
    planes = _PLANES[type](blocks) if type in _PLANES else [blocks]
    padding = data.new_zeros(n, aligned(row_bytes) - row_bytes)
    return torch.cat([*(plane.reshape(n, -1) for plane in planes), padding], dim=1)


def _tiles(q: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Fields q, uint8 [n, sub-blocks, elements], in tiles of ``size`` sub-blocks: [n, bytes]."""
    whole = q.shape[1] // size * size
    return torch.cat([_tile(q[:, :whole], bits, size), _tile(q[:, whole:], bits, 0)], dim=1)


def _tile(q: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    n, blocks, elements = q.shape
    tiles = q.reshape(n, blocks // size if size else 1, size or blocks, elements)
    fields = tiles.transpose(2, 3).reshape(n, blocks * elements * bits // 8, 8 // bits)
    packed = fields[..., 0]
    for i in range(1, 8 // bits):
        packed = packed | fields[..., i] << bits * i
    return packed


def _nibbles(q: torch.Tensor, elements: int) -> torch.Tensor:
    """Low halves and then high ones of each [..., bytes], in rows: [n, sub-blocks, elements]."""
    return torch.cat([q & 15, q >> 4], dim=-1).reshape(len(q), -1, elements)


def _q4_0(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [_tiles(_nibbles(blocks[..., 2:], 32), 4, 4), blocks[..., :2]]


def _q4_1(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [_tiles(_nibbles(blocks[..., 4:], 32), 4, 4), blocks[..., :4]]


def _q8_0(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [_tiles(blocks[..., 2:], 8, 2), blocks[..., :2]]


def _q4_k(blocks: torch.Tensor) -> list[torch.Tensor]:
    q = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32)), 32)
    return [_tiles(q, 4, 4), blocks[..., :16]]


def _q5_k(blocks: torch.Tensor) -> list[torch.Tensor]:
    q = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32)), 32)
    high = blocks[..., 16:48].unflatten(-1, (2, 16)).transpose(-2, -1)
    return [_tiles(q, 4, 4), high, blocks[..., :16]]


def _q6_k(blocks: torch.Tensor) -> list[torch.Tensor]:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)), 16)
    pairs = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    high = torch.cat([pairs >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)
    high = high.reshape(len(blocks), -1, 16)
    return [_tiles(low, 4, 4), _tiles(high, 2, 8), blocks[..., 192:208], blocks[..., 208:]]


_PLANES = {
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q8_0: _q8_0,
    QuantType.Q4_K: _q4_k,
    QuantType.Q5_K: _q5_k,
    QuantType.Q6_K: _q6_k,
}
