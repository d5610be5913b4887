"""Write the stream modules in plain PyTorch, as they stand at the top of an emitted file."""

from __future__ import annotations

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.mixing import mixing, mixing_start
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import PAPER_ALPHA, WIDTH, start_bias

MODULES = '''\
class HyperConnection(nn.Module):
    """One site of manifold-constrained hyper-connections (arXiv 2512.24880, Eq. 3 and 7-9).

    From the streams X `[..., n, C]` it computes `pre` and `post` `[..., n]` and{what} H `[..., n, n]`.
    The branch reads `pre @ X`; the next streams are `H @ X + outer(post, y)` with the branch's output y.
    """

{last}    def __init__(self, hidden, index):
        super().__init__()
        self.hidden, self.index = hidden, index
        self.phi = nn.Parameter(torch.empty({rows}, STREAMS * hidden, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.empty(3, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty({rows}, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Start as the residual network: pre sums to 1 and post is 1, while all streams are equal."""
        self.phi.zero_()
        self.alpha.fill_({paper_alpha})[:2].fill_(min(1.0, {width} / (STREAMS * self.hidden)))
{bias}

    def coefficients(self, X):
        with torch.autocast(X.device.type, enabled=False) if X.device.type != "meta" else nullcontext():
            dtype = torch.promote_types(torch.float32, X.dtype)
            v = X.flatten(-2).to(dtype)
{scale}
            z = F.linear(v, self.phi.to(dtype)) * scale
            alpha, bias = self.alpha.to(dtype), self.bias.to(dtype)
            n = STREAMS
            pre = torch.sigmoid(z[..., :n] * alpha[0] + bias[:n]){pre_eps}
            post = {post_scale} * torch.sigmoid(z[..., n : 2 * n] * alpha[1] + bias[n : 2 * n]){post_eps}
{mixing}
            return pre, post, H

    def aggregate(self, X):
        """Return what the branch reads: X `[..., n, C]` -> `[..., C]`."""
        pre, _, _ = self.coefficients(X)
        dtype = torch.promote_types(X.dtype, pre.dtype)
        return (pre.to(dtype).unsqueeze(-1) * X.to(dtype)).sum(-2).to(X.dtype)

    def distribute(self, X, y, streams=None):
        """Return the next streams `[..., n, C]`; `streams` are those that the branch read, where X is not."""
        _, post, H = self.coefficients(X if streams is None else streams)
        result = torch.promote_types(X.dtype, y.dtype)
        dtype = torch.promote_types(result, H.dtype)
        X, H = X.to(dtype), H.to(dtype)
        out = post.to(dtype).unsqueeze(-1) * y.to(dtype).unsqueeze(-2)
        for j in range(STREAMS):
            out = torch.addcmul(out, H[..., :, j, None], X[..., j, None, :])
        return out.to(result)


def expand(x, n):
    """Begin the stream: n equal copies, `[..., C]` -> `[..., n, C]`."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]).clone(memory_format=torch.contiguous_format)


def reduce(X):
    """End the stream: the {exit} of the streams, `[..., n, C]` -> `[..., C]`."""
    total = X.to(torch.promote_types(torch.float32, X.dtype)).sum(-2)
    return {total}.to(X.dtype)
'''

FIRST = '''

def first_stream(X):
    """Return one stream, for code that asks for its shape, dtype or device."""
    return X.select(-2, 0)
'''

LEAVE = '''

def leave(site, X):
    """End the stream after its last site."""
    return reduce(X) if site.last else X
'''

LEAVE_EACH = '''

def leave_each(site, function, X):
    """Apply `function` to every stream, after the last site to what the stream ends in."""
    return function(reduce(X)) if site.last else torch.stack([function(x) for x in X.unbind(-2)], -2)
'''

RECORDED = '''

def reduce_recorded(forward):
    """Reduce the hidden states that hooks recorded of the layers."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if hasattr(output, "get") and output.get("hidden_states") is not None:
            wide = output[0].ndim + 1
            output["hidden_states"] = tuple(reduce(s) if s.ndim == wide else s for s in output["hidden_states"])
        return output

    return wrapper
'''

EACH = '''

def each_stream(function, X):
    """Apply `function` to every stream."""
    return torch.stack([function(x) for x in X.unbind(-2)], -2)
'''


def stream_modules(spec: StreamSpec, used: set[str]) -> str:
    """Return the source of `HyperConnection`, `expand`, `reduce` and of what else is `used`.

    Raises MHC708 for a specification that has no source in plain PyTorch.
    """
    fields = spec.convention.fields
    if spec.form != "mhc" or fields.deferred or spec.exit not in ("mean", "sum"):
        raise MHCError("MHC708", f"{spec}")
    text = MODULES.format(
        rows=spec.rows,
        what="" if spec.manifold == "unconstrained" else " a doubly stochastic",
        paper_alpha=PAPER_ALPHA,
        width=WIDTH,
        scale=_indent(_scale(spec)),
        pre_eps=f" + {fields.pre_eps}" if fields.pre_eps else "",
        post_scale=fields.post_scale,
        post_eps=f" + {fields.post_eps}" if fields.post_eps else "",
        mixing=_indent(mixing(spec)),
        bias=_bias(spec),
        exit=spec.exit,
        last="    last = False\n\n" if {"leave", "leave_each"} & used else "",
        total="(total / STREAMS)" if spec.exit == "mean" else "total",
    )
    helpers = {"first": FIRST, "each": EACH, "leave": LEAVE, "leave_each": LEAVE_EACH, "recorded": RECORDED}
    return text + "".join(helper for kind, helper in helpers.items() if kind in used)


def _bias(spec: StreamSpec) -> str:
    """Return the statements that set the bias of a site to its start (`mhc_compile.kernels.start.start_bias`)."""
    n, bias = spec.streams, start_bias(spec, 0).tolist()
    low, high, post = bias[min(1, n - 1)], bias[0], bias[n]
    lines = [
        f"pre = torch.full((STREAMS,), {_number(low)})",
        f"pre[self.index % STREAMS] = {_number(high)}",
        f"post = torch.full((STREAMS,), {_number(post)})",
    ]
    parts = "pre, post"
    if spec.mix_rows:
        lines += mixing_start(spec)
        parts += ", mixing.flatten()"
    return "\n".join(" " * 8 + line for line in [*lines, f"self.bias.copy_(torch.cat([{parts}]))"])


def _number(value: float) -> str:
    """Return a float32 as text, zero without its sign."""
    return repr(float(f"{value:.9g}") + 0.0)


def _indent(lines: list[str]) -> str:
    return "\n".join("            " + line for line in lines)


def _scale(spec: StreamSpec) -> list[str]:
    fields = spec.convention.fields
    if fields.rms_inside:
        return [f"scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + {fields.rms_eps})"]
    return [
        "norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)",
        f"scale = 1.0 / (norm / v.shape[-1] ** 0.5 + {fields.rms_eps})",
    ]
