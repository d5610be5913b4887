"""`engram_kernels::sum_rows` as Triton kernels. Imported where Triton is.

A row of `table` has READ channels that are multiplied by those of `read` [tokens, READ], then CORES slices of SLICE
channels. Every token finds M rows: `rows`, `groups` and `scale` [tokens, M], `scores` [tokens, M, CORES]. `sums` and
their gradient are [tokens, GROUPS, CORES * SLICE]. A tile is of BM rows found and BK channels; all is float32 but the
table and `read`. Without READ there is no `scale`: tensors in its place, and in that of `read`, are not read.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def scales(
    rows, table, read, scale,
    M: tl.constexpr, READ: tl.constexpr, CORES: tl.constexpr, SLICE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the products of the rows found with `read`; a program for BM rows of a token."""
    token, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM + tl.arange(0, BM)
    there = m < M
    row = tl.load(rows + token * M + m, there, other=0)
    product = tl.zeros((BM,), tl.float32)
    for c0 in range(0, READ, BK):
        c = c0 + tl.arange(0, BK)
        inside = there[:, None] & (c < READ)[None, :]
        first = tl.load(table + row[:, None] * (READ + CORES * SLICE) + c[None, :], inside, other=0.0).to(tl.float32)
        own = tl.load(read + token * READ + c, c < READ, other=0.0).to(tl.float32)
        product += tl.sum(first * own[None, :], 1)
    tl.store(scale + token * M + m, product, there)


@triton.jit
def weighted_sums(
    rows, groups, scores, scale, table, sums,
    M: tl.constexpr, READ: tl.constexpr, CORES: tl.constexpr, SLICE: tl.constexpr, GROUPS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the sums; a program for a group of a token, which reads the rows of that group alone."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    for core in range(CORES):
        for c0 in range(0, SLICE, BK):
            c = c0 + tl.arange(0, BK)
            total = tl.zeros((BK,), tl.float32)
            for m0 in range(0, M, BM):
                m = m0 + tl.arange(0, BM)
                at = token * M + m
                member = (m < M) & (tl.load(groups + at, m < M, other=-1) == group)
                row = tl.load(rows + at, member, other=0)
                weight = tl.load(scores + at * CORES + core, member, other=0.0)
                if READ:
                    weight *= tl.load(scale + at, member, other=0.0)
                inside = member[:, None] & (c < SLICE)[None, :]
                values = table + row[:, None] * (READ + CORES * SLICE) + (READ + core * SLICE + c)[None, :]
                total += tl.sum(weight[:, None] * tl.load(values, inside, other=0.0).to(tl.float32), 0)
            to = sums + (token * GROUPS + group) * (CORES * SLICE) + core * SLICE + c
            tl.store(to, total, c < SLICE)


@triton.jit
def score_gradients(
    rows, groups, scores, scale, table, d_sums, d_scores, d_scale,
    M: tl.constexpr, READ: tl.constexpr, CORES: tl.constexpr, SLICE: tl.constexpr, GROUPS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of scores and scales; a program for BM rows of a token."""
    token, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM + tl.arange(0, BM)
    there = m < M
    at = token * M + m
    row = tl.load(rows + at, there, other=0)
    group = tl.load(groups + at, there, other=0)
    factor = tl.full((BM,), 1.0, tl.float32)
    if READ:
        factor = tl.load(scale + at, there, other=0.0)
    of_scale = tl.zeros((BM,), tl.float32)
    for core in range(CORES):
        product = tl.zeros((BM,), tl.float32)
        for c0 in range(0, SLICE, BK):
            c = c0 + tl.arange(0, BK)
            inside = there[:, None] & (c < SLICE)[None, :]
            values = table + row[:, None] * (READ + CORES * SLICE) + (READ + core * SLICE + c)[None, :]
            flows = d_sums + (token * GROUPS + group)[:, None] * (CORES * SLICE) + (core * SLICE + c)[None, :]
            product += tl.sum(tl.load(values, inside, other=0.0).to(tl.float32) * tl.load(flows, inside, other=0.0), 1)
        tl.store(d_scores + at * CORES + core, product * factor, there)
        of_scale += product * tl.load(scores + at * CORES + core, there, other=0.0)
    if READ:
        tl.store(d_scale + at, of_scale, there)


@triton.jit
def read_gradient(
    rows, table, d_scale, d_read,
    M: tl.constexpr, READ: tl.constexpr, CORES: tl.constexpr, SLICE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `read`; a program for BK channels of a token."""
    token, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK + tl.arange(0, BK)
    total = tl.zeros((BK,), tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        row = tl.load(rows + token * M + m, m < M, other=0)
        flow = tl.load(d_scale + token * M + m, m < M, other=0.0)
        inside = (m < M)[:, None] & (c < READ)[None, :]
        first = tl.load(table + row[:, None] * (READ + CORES * SLICE) + c[None, :], inside, other=0.0).to(tl.float32)
        total += tl.sum(flow[:, None] * first, 0)
    tl.store(d_read + token * READ + c, total.to(d_read.dtype.element_ty), c < READ)


@triton.jit
def row_gradients(
    groups, scores, scale, d_scale, read, d_sums, order, begins, d_rows,
    M: tl.constexpr, READ: tl.constexpr, CORES: tl.constexpr, SLICE: tl.constexpr, GROUPS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of distinct rows; a program for one, which is found at `order[begins[u] .. begins[u + 1]]`.

    Each is added up in that order of tiles: two runs are bit-equal.
    """
    u = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begins + u), tl.load(begins + u + 1)
    for c0 in range(0, READ, BK):
        c = c0 + tl.arange(0, BK)
        total = tl.zeros((BK,), tl.float32)
        for i0 in range(begin, end, BM):
            i = i0 + tl.arange(0, BM)
            m = tl.load(order + i, i < end, other=0)
            flow = tl.load(d_scale + m, i < end, other=0.0)
            inside = (i < end)[:, None] & (c < READ)[None, :]
            own = tl.load(read + (m // M)[:, None] * READ + c[None, :], inside, other=0.0).to(tl.float32)
            total += tl.sum(flow[:, None] * own, 0)
        tl.store(d_rows + u * (READ + CORES * SLICE) + c, total, c < READ)
    for core in range(CORES):
        for c0 in range(0, SLICE, BK):
            c = c0 + tl.arange(0, BK)
            total = tl.zeros((BK,), tl.float32)
            for i0 in range(begin, end, BM):
                i = i0 + tl.arange(0, BM)
                m = tl.load(order + i, i < end, other=0)
                weight = tl.load(scores + m * CORES + core, i < end, other=0.0)
                if READ:
                    weight *= tl.load(scale + m, i < end, other=0.0)
                at = m // M * GROUPS + tl.load(groups + m, i < end, other=0)
                inside = (i < end)[:, None] & (c < SLICE)[None, :]
                flows = d_sums + at[:, None] * (CORES * SLICE) + (core * SLICE + c)[None, :]
                total += tl.sum(weight[:, None] * tl.load(flows, inside, other=0.0), 0)
            tl.store(d_rows + u * (READ + CORES * SLICE) + READ + core * SLICE + c, total, c < SLICE)
