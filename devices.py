"""Run training on any number of processes, with whole or sharded weights, in float32 or half precision.

All functions also work in a single process, where most of them do nothing.
"""

import ctypes
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.metrics import Average, Metric, MetricsLambda
from ignite.utils import manual_seed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from cli import InputError, process_number
from graphs import Recorded
from model import HALF, DoubleHeadsModel, DoubleHeadsOutput, autocast, half_dtype
from weights import linear_layers

# How long the others wait for a process: in the exchange of gradients, where a silent process counts as lost, and
# elsewhere, for example while the first process downloads something or writes a checkpoint.
LOST_AFTER, PATIENCE = timedelta(seconds=50), timedelta(hours=2)

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- processes


def add_flags(add: Callable) -> None:
    """Add the flags of precision, memory and processes.

    ``add``: the ``add_argument`` of a parser or of a group of flags.
    """
    add("--fp16", default="", choices=["", "O0", *HALF],
        help="half precision: bf16, or apex's O1 (autocast), O2 (with master weights) or O3 (pure; default: none)")
    add("--shard", action="store_true", help="keep only a part of each weight in each process (FSDP2)")
    add("--gradient_checkpointing", action="store_true", help="save memory by computing hidden states twice")
    add("--compile", action="store_true", help="compile the network during the first batches")
    add("--local_rank", "--local-rank", type=process_number, default=-1,
        help="number of this process, set by a launcher of 2019")


class _Groups:
    """The process groups of this run; None if there is only one process."""

    gradients: dist.ProcessGroup | None = None  # on the devices, waits for LOST_AFTER
    agreement: dist.ProcessGroup | None = None  # on the CPUs, waits for PATIENCE


@contextmanager
def processes(args: Namespace) -> Iterator[None]:
    """Join the other processes of this run, if a launcher has started several.

    torchrun, ``python -m torch.distributed.launch`` and Slurm's ``srun`` number the processes in the environment; the
    launcher of 2019 passes ``--local_rank``. NCCL connects GPUs, gloo connects CPUs. Three arguments are changed:
    ``args.device`` to this process's own device, ``args.fp16`` to a precision that the device supports, and
    ``args.processes`` to the number of processes, unless a resumed run has set it. Raises `InputError` if there are
    more processes than GPUs, or if another process is lost during the run.
    """
    if args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    launched = "WORLD_SIZE" in os.environ
    several = int(os.environ.get("WORLD_SIZE" if launched else "SLURM_STEP_NUM_TASKS", 1)) > 1
    if several and launched:
        os.environ.pop("SLURM_JOB_ID", None)  # or ignite would ignore torchrun's processes within a Slurm job
    backend = "gloo"
    if several and torch.device(args.device).type == "cuda":
        backend, local_rank = "nccl", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"process {local_rank} has no GPU, because this machine has {torch.cuda.device_count()}; "
                             "start as many processes as GPUs, or use --device cpu")
        args.device = f"cuda:{local_rank}"
    try:
        if several:
            idist.initialize(backend, timeout=PATIENCE)
            _Groups.gradients = dist.new_group(backend=backend, timeout=LOST_AFTER)
            _Groups.agreement = dist.new_group(backend="gloo", timeout=PATIENCE)
        if not is_first():
            logging.getLogger().setLevel(logging.ERROR)  # one process speaks for all
        args.processes = args.processes or idist.get_world_size()
        args.fp16 = _usable_precision(args.device, args.fp16)
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise InputError("another process of this run was lost; see its own message, then start all processes again "
                         "with --resume RUN to continue from the last checkpoint") from None
    if several:
        idist.finalize()
        _Groups.gradients = _Groups.agreement = None


def is_first() -> bool:
    """Return whether this process is the one that writes files and prints messages."""
    return idist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until all processes have reached this point."""
    if _Groups.agreement:
        dist.barrier(_Groups.agreement)


@contextmanager
def first_of_each_machine() -> Iterator[None]:
    """Run the block in one process of each machine first, then in the others; for downloads, for example."""
    if idist.get_local_rank():
        wait_for_all()
    yield
    if not idist.get_local_rank():
        wait_for_all()


def max_over_processes(number: int) -> int:
    """Return the largest of all processes' numbers; every process gets it."""
    if not _Groups.agreement:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_Groups.agreement)
    return int(numbers)


def gather(value: object) -> list:
    """Gather the values of all processes, by rank, in the first process; the other processes get an empty list."""
    if not _Groups.agreement:
        return [value]
    values = [None] * idist.get_world_size() if is_first() else None
    dist.gather_object(value, values, group=_Groups.agreement)
    return values or []


def end_all(message: str) -> None:
    """End all processes, each of which must call this; the first one prints ``message`` as an `InputError`."""
    if is_first():
        raise InputError(message)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------------------ weights


class _Rounded(torch.autograd.Function):
    """Round weights to half precision, all in one operation; the gradients are cast back in the same way."""

    @staticmethod
    def forward(ctx, half, *weights):
        copies = [torch.empty_like(weight, dtype=half) for weight in weights]
        torch._foreach_copy_(copies, weights)
        ctx.exact = weights[0].dtype
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        exact = [torch.empty_like(gradient, dtype=ctx.exact) for gradient in gradients]
        torch._foreach_copy_(exact, gradients)
        return None, *exact


class HalfPrecision(nn.Module):
    """A wrapper that runs a model in the precision of ``--fp16``, as apex defines it; losses and scores are in float32.

    O1 and bf16: float32 weights with autocast. O2: float32 master weights (the model's) and a half-precision copy for
    each batch; gradients reach the masters through the cast. O3: weights in half precision. The choice head always
    stays in float32, see docs/architecture.md.

    On a GPU, O1 and bf16 also copy the weights of all linear layers at once, since autocast would start work for each
    of them; the result is the same. Raises `InputError` for O2 with checkpointed activations, which are computed again
    when the copies are gone.
    """

    def __init__(self, model: DoubleHeadsModel, device: str, fp16: str):
        super().__init__()
        self.model, self.device, self.fp16 = model, device, fp16
        self.copied: list[str] = []  # names of the weights that are copied
        if fp16 == "O2" and not is_sharded(model):  # FSDP makes the copies of sharded weights
            if _is_checkpointed(model):
                raise InputError("--fp16 O2 cannot compute checkpointed activations; give --fp16 bf16 or O1 with "
                                 "--gradient_checkpointing, or leave that out")
            self.copied = [name for name, _ in model.named_parameters() if not _of_choice(name)]
        elif fp16 in ("O1", "bf16") and _can_record(model, device):
            linear = {id(weight) for layer in linear_layers(model) for weight in layer.parameters()}
            self.copied = [name for name, weight in model.named_parameters()
                           if id(weight) in linear and weight.requires_grad and weight.dtype == torch.float32]

    def forward(self, **batch) -> DoubleHeadsOutput:
        with autocast(self.device, self.fp16 if self.fp16 in ("O1", "bf16") else ""):
            if not self.copied:
                return self.model(**batch)
            weights = dict(self.model.named_parameters())
            copies = _Rounded.apply(half_dtype(self.device, self.fp16), *(weights[name] for name in self.copied))
            return functional_call(self.model, dict(zip(self.copied, copies, strict=True)), (), batch)


def prepare(model: DoubleHeadsModel, device: str, fp16: str = "", shard: bool = False, seed: int = 0) -> nn.Module:
    """Return the network for training: ``model`` on its device, in its precision, synchronised across processes.

    With ``shard`` each process holds a part of every weight, gradient and optimizer state (FSDP2), and gathers the
    weights of a block to compute it; the parameters of ``model`` become these parts. Otherwise each process holds
    everything. Afterwards each process has its own random numbers, for dropout.
    """
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # faster; training needs no exact float32 products
    model.to(device)
    half, world = half_dtype(device, fp16), idist.get_world_size()
    if fp16 == "O3":
        for name, weight in model.named_parameters():
            if not _of_choice(name):
                weight.data = weight.data.to(half)
    elif fp16 in ("O1", "bf16") and not shard and getattr(model, "peft_config", None):
        for layer in linear_layers(model):  # cast frozen weights once, not in every forward pass
            if not layer.weight.requires_grad and isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.data.to(half)
    if shard and world > 1:
        mesh = DeviceMesh.from_group(_Groups.gradients, torch.device(device).type)
        masters = MixedPrecisionPolicy(half, torch.float32) if fp16 == "O2" else MixedPrecisionPolicy()
        fully_shard(model.multiple_choice_head, mesh=mesh)
        for part in (*blocks(model), model):
            fully_shard(part, mesh=mesh, mp_policy=masters)
    elif shard:
        logger.warning("--shard: there is only one process, which keeps all weights")
    network = HalfPrecision(model, device, fp16)
    if world > 1 and not shard:
        network = DistributedDataParallel(network, process_group=_Groups.gradients, forward_sync_buffers=False,
                                          gradient_as_bucket_view=True)
    if not is_first():
        manual_seed(seed + idist.get_rank())
    return network


def blocks(model: DoubleHeadsModel) -> nn.ModuleList:
    """Return the blocks of a decoder: each has an attention layer and a feed-forward layer."""
    return next(part for part in model.base_model.modules() if isinstance(part, nn.ModuleList))


def compile_(model: DoubleHeadsModel) -> None:
    """Compile the blocks of a decoder, in place; this happens during the first batch.

    All blocks have the same code, so torch compiles it once. Compiling the whole network at once would take as long per
    block. Rows differ in length, so sizes are variables in the compiled code.
    """
    for block in blocks(model):
        block.compile(dynamic=True)


def loss_scaler(device: str, fp16: str) -> torch.amp.GradScaler:
    """Return a loss scaler, active only for float16; bfloat16, which CPUs use, has the range of float32."""
    kind = torch.device(device).type
    return torch.amp.GradScaler(kind, enabled=fp16 in ("O1", "O2") and kind != "cpu")


def _usable_precision(device: str, fp16: str) -> str:
    """Return ``fp16``, or, with a warning, the nearest setting that this device supports."""
    kind = torch.device(device).type
    if kind == "cpu" and fp16 in ("O1", "O2", "O3"):
        logger.warning("--fp16 %s: on a CPU, half precision is bfloat16, which needs no loss scaling", fp16)
    elif kind == "cuda" and fp16 == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning("--fp16 bf16: this GPU has no bfloat16; computing in float16 with loss scaling, as --fp16 O1")
        return "O1"
    return fp16


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor from all processes, each of which must call this; return other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Move a whole tensor to the device of ``like``, and shard it in the same way."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def _of_choice(name: str) -> bool:
    return name.startswith("multiple_choice_head.")


# ----------------------------------------------------------------------------------------------------- training


def scale_losses(out: DoubleHeadsOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (lm_loss, mc_loss) twice: scaled for this process's backward pass, and averaged over the batch for logs.

    lm_loss is a mean over tokens and mc_loss a mean over turns, but processes have different numbers of these, and
    their gradients are averaged. So each process scales its losses by its share of the batch's tokens or turns, times
    the number of processes. The averaged gradient then equals that of one process with the whole batch.
    """
    losses = torch.stack([out.lm_loss, out.mc_loss])
    if not _Groups.gradients:
        return losses, losses.detach()
    counts = torch.stack([out.tokens.sum(), out.turns]).double()
    totals = torch.stack([counts, counts * losses.detach()])
    dist.all_reduce(totals, group=_Groups.gradients)
    weights = idist.get_world_size() * counts / totals[0]
    return losses * weights.float(), totals[1] / totals[0]


def exchanging(network: nn.Module, now: bool) -> AbstractContextManager:
    """Return the context for a batch's forward and backward pass; gradients are exchanged if ``now``.

    Sharded gradients are exchanged with every batch, because storing them whole would need the memory that sharding
    saves.
    """
    return nullcontext() if now or not isinstance(network, DistributedDataParallel) else network.no_sync()


def recorded(network: nn.Module, device: str) -> Callable:
    """Return a decorator for ``gradients(batch, group)``, which adds to the gradients of the network's weights.

    It makes CUDA graphs of the function (`Recorded`) if it can and all weights are float32; otherwise it does nothing.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if not _can_record(network, device) or any(weight.dtype != torch.float32 for weight in weights):
        return lambda gradients: gradients
    return partial(partial, _RecordedGradients(weights))


def _can_record(network: nn.Module, device: str) -> bool:
    """Return whether a single process trains on a GPU, without checkpointed activations.

    These cannot be recorded, since they read the state of the random numbers.
    """
    return device.startswith("cuda") and idist.get_world_size() == 1 and not _is_checkpointed(network)


def _is_checkpointed(network: nn.Module) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in network.modules())


class _RecordedGradients:
    """Calls of ``gradients(batch, group)`` as CUDA graphs, which keep the gradients of ``weights`` in one place.

    The backward pass writes each gradient to new memory of the graph, and then all of them are moved at once. Adding
    each to its place would start work for every weight, and read and write twice as much.
    """

    def __init__(self, weights: list[nn.Parameter]):
        self.weights, self.recorded = weights, Recorded()
        self.places: dict[nn.Parameter, torch.Tensor] = {}  # without weights that get no gradient

    def __call__(self, gradients: Callable, batch: dict[str, torch.Tensor], group: int) -> torch.Tensor:
        first_of_step = all(weight.grad is None for weight in self.weights)
        result = self.recorded(partial(self._compute, gradients), batch, (group, first_of_step))
        for weight, place in self.places.items():
            weight.grad = place
        return result

    def _compute(self, gradients: Callable, batch: dict[str, torch.Tensor], constant: tuple[int, bool]) -> torch.Tensor:
        group, first_of_step = constant
        for weight in self.weights:
            weight.grad = None
        result = gradients(batch, group)
        new = {weight: weight.grad for weight in self.weights if weight.grad is not None}
        for weight, gradient in new.items():
            if weight not in self.places:  # in the first batch, which is not recorded
                self.places[weight] = torch.empty_like(gradient)
        move = torch._foreach_copy_ if first_of_step else torch._foreach_add_
        move([self.places[weight] for weight in new], [*new.values()])
        return result


def mean_over_turns(value: Callable[[DoubleHeadsOutput], torch.Tensor]) -> Metric:
    """Return a metric: the mean of ``value(output)``, of shape (batch,), over all turns of all processes."""
    return MetricsLambda(float, Average(lambda out: value(out)[out.tokens > 0, None].double()))  # padding has no tokens


def read_every(device: str) -> int:
    """Return after how many batches losses are read, and signals exchanged, while training on ``device``.

    Reading a number from a GPU makes the CPU wait until everything before it is computed, and the GPU then waits for
    the CPU.
    """
    return 1 if torch.device(device).type == "cpu" else 16


TRIMMED_EVERY = 8  # batches


def _give_memory_back() -> None:
    """Return free pages of the heap to the system; this does nothing where the C library is not glibc.

    glibc keeps the memory of a batch's tensors. It rarely fits the next batch, which has other lengths, so the heap
    would grow with every batch.
    """
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def within_memory(process: Callable, args: Namespace, training: bool = True) -> Callable:
    """Wrap ``process(engine, batch)``: if memory runs out, an `InputError` says which flag to lower to which value."""

    def explained(engine, batch):
        try:
            output = process(engine, batch)
            if engine.state.iteration % TRIMMED_EVERY == 0:
                _give_memory_back()
            return output
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) \
                    and "can't allocate memory" not in str(error):
                raise
        turns, positions = batch["input_ids"].shape
        if not training:
            cure = f"give --valid_batch_size {args.valid_batch_size // 2 or 1}"
        elif args.train_batch_size > 1:
            half = -(-args.train_batch_size // 2)
            cure = (f"give --train_batch_size {half} --gradient_accumulation_steps "
                    f"{2 * args.gradient_accumulation_steps}, or resume with twice as many processes")
        else:
            cure = f"give a --num_candidates below {args.num_candidates}, a smaller --max_history, or --fp16 bf16"
        raise InputError(f"out of memory on a batch of {turns} turns, {positions} positions each; {cure}")

    return explained
