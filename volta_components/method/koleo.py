# SPDX-License-Identifier: Apache-2.0
"""KoLeo, which is not in the paper: summaries are spread out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from volta_components.distributed import gather_rows, process_rank
from volta_components.method.projection import full_float32


class KoLeoLoss(nn.Module):
    """Kozachenko-Leonenko entropy: pushes each embedding away from its nearest neighbour in the batch and a queue.

    With one volume a step there is no neighbour within the batch, hence the queue of the last embeddings. Neighbours
    are constants: no gradient flows to them. Views of one volume in one mini-batch never count as each other's
    neighbours, since they are meant to be alike.

    The queue does not know whose its embeddings are, and epochs are shuffled: a volume's own from the epoch before may
    be among them. With two views, 256 embeddings and 192 volumes it is, for 1 volume in 5; with a queue a fifth as long
    as there are volumes, for 1 in 200.

    Args:
        dim: size of an embedding.
        queue_size: embeddings that are remembered.

    Shapes:
        embeddings: ``[V, B, D]``, any scale; they are normalised here.

    Source: Sablayrolles et al., 2019, eq. 3; as used in DINOv2 (Oquab et al., 2023).
    """

    queue: Tensor
    filled: Tensor

    def __init__(self, dim: int, queue_size: int = 256) -> None:
        super().__init__()
        self.queue_size = queue_size
        self.register_buffer("queue", torch.zeros(queue_size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def forward(self, embeddings: Tensor) -> Tensor:
        """``-mean(ln(distance to the nearest neighbour))``; 0 while there is no neighbour."""
        unit = functional.normalize(embeddings.float(), dim=-1, eps=1e-8)
        views, batch, _ = unit.shape
        everyone = gather_rows(unit.detach().transpose(0, 1))  # [processes * B, V, D]
        others = torch.cat([everyone.flatten(0, 1), self.queue])
        held = torch.arange(len(others), device=unit.device) < everyone.shape[0] * views + self.filled
        owner = torch.full((len(others),), -1, device=unit.device)
        owner[: len(everyone) * views] = torch.arange(len(everyone), device=unit.device).repeat_interleave(views)
        me = torch.arange(batch, device=unit.device) + process_rank() * batch
        with torch.no_grad(), full_float32(unit.device):
            similarity = torch.einsum("vbd,nd->vbn", unit, others)
            similarity = similarity.masked_fill((owner == me[:, None]) | ~held, -torch.inf)
            found, nearest = similarity.max(dim=-1)
        # No ``if``: it would make a GPU wait.
        loss = -(torch.log((unit - others[nearest]).norm(dim=-1) + 1e-8) * found.isfinite()).mean()
        if self.training:
            newest = everyone.flatten(0, 1)
            with torch.no_grad():
                self.queue.copy_(torch.cat([newest, self.queue])[: len(self.queue)])
                self.filled.add_(len(newest)).clamp_(max=len(self.queue))
        return loss
