"""Record what a GPU computes for a batch, and replay it for later batches of the same shape.

The CPU starts each of a thousand operations of a training step on its own, and takes longer for this than a large GPU
takes to compute them. A CUDA graph starts all of them at once.
"""

import itertools
import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

MOST_GRAPHS = 256  # of the whole process; each needs some megabytes of the driver's memory
UNUSED = 10 * MOST_GRAPHS  # calls
logger = logging.getLogger(__name__)


@dataclass
class Graph:
    """A recorded call."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    result: torch.Tensor
    last_use: int = 0  # number of the call


class Recorded:
    """Calls of a ``function(batch, constant)`` on a GPU, recorded once per shape of batches and replayed from then on.

    ``batch`` is a dictionary of tensors, ``constant`` anything else on which the computation depends. The function must
    not read a number from the GPU; what it changes, such as gradients, must stay at the same place in memory. It
    returns a tensor. A shape is computed as usual when it occurs for the first time, which also prepares its kernels,
    and recorded when it occurs again. If recording fails, everything is computed as usual from then on.

    All graphs of this object share their memory, because none needs what another has left there. The whole process has
    at most `MOST_GRAPHS` graphs; one that the last `UNUSED` calls have not needed gives way to a new one. The function
    is an argument of each call, so that an object that records its own method has no reference to itself, and its
    memory is free at once.
    """

    calls = itertools.count(1)
    everyone: "weakref.WeakSet[Recorded]" = weakref.WeakSet()

    def __init__(self):
        self.pool, self.failed = None, False
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, Graph] = {}
        Recorded.everyone.add(self)

    def __call__(self, function: Callable[[dict[str, torch.Tensor], Any], torch.Tensor],
                 batch: dict[str, torch.Tensor], constant: Any) -> torch.Tensor:
        shape, call = (constant, *((name, tensor.shape) for name, tensor in batch.items())), next(Recorded.calls)
        if shape not in self.graphs:
            if self.failed or shape not in self.seen or not self._may_record(call):
                self.seen.add(shape)
                return function(batch, constant)
            try:
                self.graphs[shape] = self._record(function, batch, constant)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.failed = True
                logger.warning("Steps cannot be recorded as CUDA graphs: %s", str(error).split("\n")[0])
                return function(batch, constant)
        found = self.graphs[shape]
        found.last_use = call
        torch._foreach_copy_(found.inputs, list(batch.values()), non_blocking=True)
        found.graph.replay()
        return found.result.clone()

    @staticmethod
    def _may_record(call: int) -> bool:
        """Return whether there may be another graph; drop an old one for it if necessary."""
        every = [(graph.last_use, one, shape) for one in Recorded.everyone for shape, graph in one.graphs.items()]
        if len(every) < MOST_GRAPHS:
            return True
        last_use, owner, shape = min(every, key=lambda one: one[0])
        if call - last_use <= UNUSED:
            return False
        del owner.graphs[shape]
        if not owner.graphs:
            owner.pool = None  # torch gives a pool up with its last graph
        return True

    def _record(self, function: Callable[[dict[str, torch.Tensor], Any], torch.Tensor], batch: dict[str, torch.Tensor],
                constant: Any) -> Graph:
        """Record a call; this computes nothing yet."""
        graph, inputs = torch.cuda.CUDAGraph(), {name: tensor.clone() for name, tensor in batch.items()}
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # another thread pins memory
            result = function(inputs, constant)
        return Graph(graph, list(inputs.values()), result)
