"""`engram_kernels::rows` as a Triton kernel. Imported where Triton is."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def rows(
    ids,
    reach,
    before,
    constants,
    out,
    tokens,
    length,
    N: tl.constexpr,
    K: tl.constexpr,
    HASHES: tl.constexpr,
    BEFORE: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Write the rows [tokens, HASHES] of `tokens` ids, a batch of sequences of `length`, BT tokens per program.

    `constants`, in turn: N multipliers, the fill, and for all hashes p, the offset and floor((2^64 - 1) / p).
    """
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    head = tl.arange(0, BH)
    inside = t < tokens
    at = t % length
    far = tl.load(reach + t, mask=inside, other=0)
    fill = tl.load(constants + N)
    mix = tl.load(ids + t, mask=inside, other=0) * tl.load(constants)
    x = tl.zeros((BT, BH), tl.int64)
    for i in tl.static_range(1, N):
        here = inside & (far >= i)
        earlier = tl.load(ids + t - i, mask=here & (at >= i), other=0)
        if BEFORE:
            row = t // length * (N - 1) + (N - 1) + at - i
            earlier = tl.where(at >= i, earlier, tl.load(before + row, mask=here & (at < i), other=0))
        else:
            here = here & (at >= i)
        mix = mix ^ (tl.where(here, earlier, fill) * tl.load(constants + i))
        x = tl.where((head // K == i - 1)[None, :], mix[:, None], x)
    known = head < HASHES
    p = tl.load(constants + N + 1 + head, mask=known, other=1).to(tl.uint64)[None, :]
    offset = tl.load(constants + N + 1 + HASHES + head, mask=known, other=0)[None, :]
    inverse = tl.load(constants + N + 1 + 2 * HASHES + head, mask=known, other=0).to(tl.uint64)[None, :]
    # |x| mod p: floor(|x| * inverse / 2^64) is the quotient or one less, because |x| <= 2^63.
    size = tl.where(x < 0, 0 - x, x).to(tl.uint64)
    r = size - tl.umulhi(size, tl.broadcast_to(inverse, (BT, BH))) * p
    r = tl.where(r >= p, r - p, r)
    r = tl.where((x < 0) & (r != 0), p - r, r)
    numbers = r.to(tl.int64) + offset
    tl.store(out + t[:, None] * HASHES + head[None, :], numbers, mask=inside[:, None] & known[None, :])
