"""In: a ModelConfig. Out: the float Graph of one step: formats f32, norms in 64 bits.

Llama, Mistral, SmolLM2, Qwen2 and Qwen3 are one decoder with options: biases, norms of query and
key heads, sliding windows, a tied head. Values are named after their place: l3.q, l3.attn_out.
"""

from __future__ import annotations

from openlpu.graph import Attr, Graph, Op, Param, attrs
from openlpu.load.config import ModelConfig
from openlpu.models.rope import rope_table

FLOAT_BITS = 64


def build(config: ModelConfig) -> Graph:
    """The Graph that computes what the checkpoint's own implementation computes, in float.

    Only the rows whose logits are wanted go through the last norm and the head.
    """
    builder = _Builder(config)
    return Graph(
        name=config.arch,
        context=config.context,
        rope=rope_table(config.rope, config.head_dim),
        ops=builder.ops(),
        output="logits",
        meta=(("layers", config.layers), ("vocab_size", config.vocab_size)),
    )


class _Builder:
    """Collects the ops of one model in order."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._ops: list[Op] = []

    def ops(self) -> tuple[Op, ...]:
        """All ops, from token ids to logits."""
        c = self.config
        table = Param("embed", (c.vocab_size, c.dim), "f32", "embed")
        stream = self._add("embed", "embed", ("tokens",), (table,))
        for layer in range(c.layers):
            stream = self._attention(layer, stream)
            stream = self._ffn(layer, stream)
        last = self._add("rows", "last", (stream,))
        normed = self._norm("final_in", last, "final_norm")
        head = Param("head", (c.vocab_size, c.dim), "f32", "embed" if c.tied else "head")
        self._add("linear", "logits", (normed,), (head,))
        return tuple(self._ops)

    def _attention(self, layer: int, stream: str) -> str:
        c, here, names = self.config, f"l{layer}", f"layers.{layer}"
        x = self._norm(f"{here}.attn_in", stream, f"{names}.attn_norm")
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        q = self._linear(f"{here}.q", x, f"{names}.q", q_width, c.dim, bias=c.qkv_bias)
        k = self._linear(f"{here}.k", x, f"{names}.k", kv_width, c.dim, bias=c.qkv_bias)
        v = self._linear(f"{here}.v", x, f"{names}.v", kv_width, c.dim, bias=c.qkv_bias)
        if c.qk_norm:
            q = self._norm(f"{here}.q_normed", q, f"{names}.q_norm", heads=c.heads)
            k = self._norm(f"{here}.k_normed", k, f"{names}.k_norm", heads=c.kv_heads)
        q = self._add("rope", f"{here}.q_turned", (q,), heads=c.heads)
        k = self._add("rope", f"{here}.k_turned", (k,), heads=c.kv_heads)
        attended = self._add(
            "attention",
            f"{here}.attn",
            (q, k, v),
            layer=layer,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            window=c.windows[layer] or 0,
            format="f32",
        )
        o = self._linear(f"{here}.o", attended, f"{names}.o", c.dim, q_width, bias=c.o_bias)
        return self._add("add", f"{here}.attn_out", (stream, o))

    def _ffn(self, layer: int, stream: str) -> str:
        c, here, names = self.config, f"l{layer}", f"layers.{layer}"
        x = self._norm(f"{here}.ffn_in", stream, f"{names}.ffn_norm")
        gate = self._linear(f"{here}.gate", x, f"{names}.gate", c.ffn_dim, c.dim, bias=c.mlp_bias)
        up = self._linear(f"{here}.up", x, f"{names}.up", c.ffn_dim, c.dim, bias=c.mlp_bias)
        h = self._add("swiglu", f"{here}.ffn_hidden", (gate, up))
        down = self._linear(f"{here}.down", h, f"{names}.down", c.dim, c.ffn_dim, bias=c.mlp_bias)
        return self._add("add", f"{here}.ffn_out", (stream, down))

    def _norm(self, out: str, x: str, source: str, *, heads: int | None = None) -> str:
        """Over the whole row, or over each of `heads` heads alone."""
        width = self.config.dim if heads is None else self.config.head_dim
        gain = Param(source, (width,), "f32", source)
        eps, heads = self.config.norm_eps, heads or 1
        return self._add("rmsnorm", out, (x,), (gain,), eps=eps, heads=heads, bits=FLOAT_BITS)

    def _linear(self, out: str, x: str, source: str, n: int, k: int, *, bias: bool) -> str:
        params = [Param(source, (n, k), "f32", source)]
        if bias:
            params.append(Param(f"{source}_bias", (n,), "f32", f"{source}_bias"))
        return self._add("linear", out, (x,), tuple(params))

    def _add(
        self,
        kind: str,
        out: str,
        src: tuple[str, ...],
        params: tuple[Param, ...] = (),
        **options: Attr,
    ) -> str:
        self._ops.append(Op(kind, out, src, params, attrs(**options)))
        return out
