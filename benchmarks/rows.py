"""The pieces of work that are measured: sizes of real cross-attention layers, and tensors of these sizes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crossattention import CrossAttention

Kind = Literal["plain", "class token", "beams", "learned", "decode"]


@dataclass(frozen=True)
class Row:
    """One piece of work.

    Args:
        name: how it stands in the table.
        query_length: length of A.
        context_length: length of B.
        query_dim: width of A and of the output.
        context_dim: width of B.
        heads: number of heads.
        head_dim: width of each head; heads * head_dim need not be query_dim.
        batch: number of contexts.
        kind: "plain"; "class token": A is B's first position; "beams": `repeats` sequences read one context; "learned": one A for
            the whole batch; "decode": `steps` different A one after the other read a context that is prepared once.
        repeats: beams on one context.
        steps: reads of one prepared context.
    """

    name: str
    query_length: int
    context_length: int
    query_dim: int
    context_dim: int
    heads: int
    head_dim: int
    batch: int = 1
    kind: Kind = "plain"
    repeats: int = 1
    steps: int = 1

    @property
    def query_shape(self) -> tuple[int, ...]:
        """Shape of what one call of the layer reads B with."""
        item = (self.query_length, self.query_dim)
        return {"learned": item, "beams": (self.batch, self.repeats, *item)}.get(self.kind, (self.batch, *item))

    @property
    def context_shape(self) -> tuple[int, int, int]:
        """Shape of B."""
        return (self.batch, self.context_length, self.context_dim)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one row: B, and A where it is no part of B. Of a decode row, A has the steps as its first dimension."""

    a: Tensor | None
    b: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that a training step gives gradients to."""
        return [tensor for tensor in (self.a, self.b) if tensor is not None]

    def queries(self) -> Tensor:
        """A; asked for within each call, because as a part of B it belongs to that call's graph."""
        return self.b[:, :1] if self.a is None else self.a


def make_inputs(row: Row, dtype: torch.dtype, device: str, train: bool) -> Inputs:
    """Random tensors of the row's sizes."""
    kwargs = {"dtype": dtype, "device": device, "requires_grad": train}
    shape = (row.steps, *row.query_shape) if row.kind == "decode" else row.query_shape
    a = None if row.kind == "class token" else torch.randn(shape, **kwargs)
    return Inputs(a, torch.randn(row.context_shape, **kwargs))


def make_layer(row: Row, dtype: torch.dtype, device: str, **options: object) -> CrossAttention:
    """A layer of the row's sizes; its biases are zero, because one of the peers has none."""
    sizes = {"heads": row.heads, "head_dim": row.head_dim, "dtype": dtype, "device": device}
    return CrossAttention(row.query_dim, row.context_dim, **sizes, **options)


ROWS = [
    Row("class token 8 x 1 x 401, 384, 6h", 1, 401, 384, 384, 6, 64, batch=8, kind="class token"),
    Row("1 x 65,536, 768, 12h", 1, 65536, 768, 768, 12, 64),
    Row("1 x 1,500, 384, 6h", 1, 1500, 384, 384, 6, 64),
    Row("8 x 16,384, 768, 12h", 8, 16384, 768, 768, 12, 64),
    Row("32 x 4,096, 1024, 16h", 32, 4096, 1024, 1024, 16, 64),
    Row("512 x 50,176, 1024 on 261, 1h", 512, 50176, 1024, 261, 1, 261),
    Row("50,176 x 512, 322 on 512, 1h", 50176, 512, 322, 512, 1, 512),
    Row("4,096 x 4, 320 on 768, 8h", 4096, 4, 320, 768, 8, 40),
    Row("4,096 x 77, 320 on 768, 8h", 4096, 77, 320, 768, 8, 40),
    Row("1,024 x 16, 1280 on 768, 20h", 1024, 16, 1280, 768, 20, 64),
    Row("256 x 2,048, 1280 on 768, 8h", 256, 2048, 1280, 768, 8, 160),
    Row("8 beams on 1 x 1,024, 512, 8h", 1, 1024, 512, 512, 8, 64, kind="beams", repeats=8),
    Row("200 steps on 1 x 512, 768, 12h", 1, 512, 768, 768, 12, 64, kind="decode", steps=200),
    Row("512 learned on 16 x 196, 512 on 768, 8h", 512, 196, 512, 768, 8, 64, batch=16, kind="learned"),
]
