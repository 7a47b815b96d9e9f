"""Draws that a seed decides alone: Gumbel noise from a hash of seed, sequence, position and token.

argmax(log p + g) with independent standard Gumbel numbers g draws from p (the Gumbel-max trick; Maddison, Tarlow and
Minka, "A* Sampling", arXiv 1411.0030). The noise is a function of numbers that a request brings, with no state, so that
neither the batch around it nor a preemption changes it.

    key     64 bits: BLAKE2b of (seed, sequence, position), each a little-endian int64; on the host, once a token
    hash    32 bits: mix(mix(token ^ low half of key) ^ high half of key)
    g       -log(-log1p(-v)), v = (hash // 2 + 1/2) / 2^31, at most 1 - 2^-24

`mix` is the 32-bit finaliser "lowbias32" (Wellons, "Prospecting for Hash Functions", nullprogram.com, 2018). v near 0
is what wins a draw; there float32 keeps every bit of it. Tokens of a probability below 2^-32 come out less often still.

Axes: B rows of a step, V the vocabulary.
"""

from __future__ import annotations

import hashlib
import struct

import torch

_FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)  # as int32, whose products wrap
_LARGEST = 1 - 2.0**-24


def draw_key(seed: int, sequence: int, position: int) -> tuple[int, int]:
    """The halves, low and high, of the key of one draw, each as an int32."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, sequence, position), digest_size=8).digest()
    low, high = struct.unpack("<ii", digest)
    return low, high


def hashes(low_B: torch.Tensor, high_B: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`[B, V]` int32, all 32 bits used: the hash of every token under each row's key.

    Args:
        low_B, high_B: int32 halves of the keys.
        vocab_size: V.
    """
    tokens_V = torch.arange(vocab_size, dtype=torch.int32, device=low_B.device)
    return _mix(_mix(tokens_V ^ low_B[:, None]) ^ high_B[:, None])


def gumbel(low_B: torch.Tensor, high_B: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`[B, V]` float32: standard Gumbel noise of every token under each row's key."""
    halves_BV = (hashes(low_B, high_B, vocab_size) >> 1) & 0x7FFFFFFF
    uniform_BV = ((halves_BV.float() + 0.5) * 2.0**-31).clamp_(max=_LARGEST)
    return uniform_BV.neg_().log1p_().neg_().log_().neg_()


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 16)) * _FACTORS[0]
    bits = (bits ^ _shifted(bits, 15)) * _FACTORS[1]
    return bits ^ _shifted(bits, 16)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """To the right as if there were no sign."""
    return (bits >> by) & ((1 << (32 - by)) - 1)
