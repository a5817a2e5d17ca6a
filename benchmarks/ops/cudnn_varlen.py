"""cuDNN's attention on packed sequences, through the graphs of nvidia-cudnn-frontend.

A pack is a batch [B, H, L, D] of the longest length L, whose sequences begin at offsets of their
own ("ragged") and whose lengths are the padding mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Graph:
    """One graph over a pack: its nodes, and the input tensors of every run."""

    def __init__(self, cudnn: Any, cu_seqlens: Tensor, longest: int, num_heads: int) -> None:
        types = cudnn.data_type
        self.cudnn, self.longest, self.num_heads = cudnn, longest, num_heads
        self.cu_seqlens = cu_seqlens
        self.handle = cudnn.create_handle()
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph = cudnn.pygraph(
            io_data_type=types.BFLOAT16,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self.handle,
        )
        self.fed: dict[Any, Tensor] = {}
        self.lengths = self._input(cu_seqlens.diff(), types.INT32)

    def _input(self, values: Tensor, data_type: Any) -> Any:
        """An int [n] input of every run."""
        ones = [1, 1, 1]
        tensor = self.graph.tensor(dim=[len(values), *ones], stride=[1, *ones], data_type=data_type)
        self.fed[tensor] = values
        return tensor

    def layout(self, token: int, width: int) -> dict[str, Any]:
        """The layout of a pack [T, H, width] whose tokens are ``token`` elements apart."""
        offsets = self._input(self.cu_seqlens.long() * token, self.cudnn.data_type.INT64)
        return {
            "dim": [len(self.cu_seqlens) - 1, self.num_heads, self.longest, width],
            "stride": [self.longest * token, width, token, 1],
            "ragged_offset": offsets,
        }

    def output(self, tensor: Any, token: int, width: int, data_type: Any) -> None:
        """Marks a result as an output, in that layout."""
        layout = self.layout(token, width)
        tensor.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"])
        tensor.set_data_type(data_type)
        tensor.set_ragged_offset(layout["ragged_offset"])

    def build(self) -> None:
        """Compiles the graph; raises cuDNN's error where it has no kernel."""
        self.graph.validate()
        self.graph.build_operation_graph()
        modes = self.cudnn.heur_mode
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        size = self.graph.get_workspace_size()
        self.workspace = torch.empty(size, device=self.cu_seqlens.device, dtype=torch.uint8)

    def run(self, tensors: dict[Any, Tensor]) -> None:
        """Fills the outputs among the tensors."""
        self.graph.execute(self.fed | tensors, self.workspace, handle=self.handle)


class Attention:
    """q, k, v [T, H, D] bf16, as two halves of one projection and a third of another, -> out."""

    def __init__(
        self,
        cudnn: Any,
        cu_seqlens: Tensor,
        lengths: list[int],
        window: tuple[int, int],
        num_heads: int,
        head_dim: int = 64,
    ) -> None:
        left, right = window
        row, bf16, fp32 = num_heads * head_dim, cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
        self.forward, self.backward = (
            Graph(cudnn, cu_seqlens, max(lengths), num_heads) for _ in range(2)
        )

        def options(graph: Graph) -> dict[str, Any]:
            return {
                "attn_scale": head_dim**-0.5,
                "use_padding_mask": True,
                "seq_len_q": graph.lengths,
                "seq_len_kv": graph.lengths,
                # The left bound is the first distance that is out of sight.
                "diagonal_band_left_bound": None if left == -1 else left + 1,
                "diagonal_band_right_bound": None if right == -1 else right,
            }

        graph = self.forward
        inputs = [graph.graph.tensor(**graph.layout(n * row, head_dim)) for n in (2, 2, 3)]
        out, stats = graph.graph.sdpa(*inputs, generate_stats=True, **options(graph))
        graph.output(out, row, head_dim, bf16)
        graph.output(stats, num_heads, 1, fp32)
        self.forward_names = [*inputs, out, stats]

        graph = self.backward
        inputs = [graph.graph.tensor(**graph.layout(n * row, head_dim)) for n in (2, 2, 3, 1, 1)]
        inputs.append(graph.graph.tensor(**graph.layout(num_heads, 1), data_type=fp32))
        gradients = graph.graph.sdpa_backward(
            *inputs,
            max_total_seq_len_q=sum(lengths),
            max_total_seq_len_kv=sum(lengths),
            **options(graph),
        )
        for gradient in gradients:
            graph.output(gradient, row, head_dim, bf16)
        self.backward_names = [*inputs, *gradients]
        for graph in (self.forward, self.backward):
            graph.build()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """-> out [T, H, D]."""
        return _Function.apply(q, k, v, self)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        stats = torch.empty((*q.shape[:2], 1), device=q.device)
        tensors = (q, k, v, out, stats)
        attention.forward.run(dict(zip(attention.forward_names, tensors, strict=True)))
        ctx.save_for_backward(*tensors)
        ctx.attention = attention
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        gradients = [torch.empty(q.shape, device=q.device, dtype=q.dtype) for _ in range(3)]
        tensors = (q, k, v, out, dout.contiguous(), stats, *gradients)
        attention = ctx.attention
        attention.backward.run(dict(zip(attention.backward_names, tensors, strict=True)))
        return *gradients, None
