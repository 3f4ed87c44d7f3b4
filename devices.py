"""Where training runs: in one process or many, with whole or sharded weights, in which precision.

Knows processes, devices and number formats; nothing of dialogs, files or the training loop. All of it works in one
process, too, where most of it does nothing.
"""

import ctypes
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

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
from model import HALF, DoubleHeadsModel, DoubleHeadsOutput, autocast, half_dtype
from weights import linear_layers

# A process that does not answer within a step's exchange is lost. Before the first step, and while one process writes
# a checkpoint, the others wait longer.
LOST_AFTER, PATIENCE = timedelta(seconds=50), timedelta(hours=2)

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- processes


def add_flags(add: Callable) -> None:
    """The flags of precision and processes; ``add``: the ``add_argument`` of a parser or of a group of flags."""
    add("--fp16", default="", choices=["", "O0", *HALF],
        help="half precision: bf16, or apex's O1 (autocast), O2 (with master weights) or O3 (pure; default: none)")
    add("--shard", action="store_true", help="keep only a part of each weight in each process (FSDP2)")
    add("--local_rank", "--local-rank", type=process_number, default=-1,
        help="number of this process, set by a launcher of 2019")


class _Groups:
    """Of the processes of this run; None where there is only one."""

    gradients: dist.ProcessGroup | None = None  # on the devices, impatient
    agreement: dist.ProcessGroup | None = None  # on the CPUs, patient


@contextmanager
def processes(args: Namespace) -> Iterator[None]:
    """Join the other processes of this run, if a launcher started some; ``args.device`` becomes this process's own.

    torchrun, ``python -m torch.distributed.launch`` and its forebear of 2019, which gave ``--local_rank``, say in the
    environment who is who, and so does Slurm's ``srun``. NCCL joins GPUs, gloo CPUs. ``args.processes`` becomes how
    many there are, unless a resumed run knows how many it began with; ``args.fp16`` what the device can do. Raises
    `InputError` when there are more processes than GPUs, and when another process is lost on the way.
    """
    if args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    launched = "WORLD_SIZE" in os.environ
    several = int(os.environ.get("WORLD_SIZE" if launched else "SLURM_STEP_NUM_TASKS", 1)) > 1
    if several and launched:
        os.environ.pop("SLURM_JOB_ID", None)  # ignite would take torchrun's processes on a node for one of Slurm's
    backend = "gloo"
    if several and torch.device(args.device).type == "cuda":
        backend, local_rank = "nccl", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                             "start as many processes as GPUs, or give --device cpu")
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
        raise InputError("another process of this run was lost; see its own message, start all of them again, and "
                         "give --resume RUN to go on from the last checkpoint") from None
    if several:
        idist.finalize()
        _Groups.gradients = _Groups.agreement = None


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return idist.get_rank() == 0


def wait_for_all() -> None:
    """Return when all processes have come here, however long one of them takes."""
    if _Groups.agreement:
        dist.barrier(_Groups.agreement)


@contextmanager
def first_of_each_machine() -> Iterator[None]:
    """One process of each machine does what is inside, a download, say; then the others, who find it done."""
    if idist.get_local_rank():
        wait_for_all()
    yield
    if not idist.get_local_rank():
        wait_for_all()


def max_over_processes(number: int) -> int:
    """The largest of all processes' numbers, in every process."""
    if not _Groups.agreement:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_Groups.agreement)
    return int(numbers)


def gather(value: object) -> list:
    """All processes' values, by rank; in the others than the first, nothing."""
    if not _Groups.agreement:
        return [value]
    values = [None] * idist.get_world_size() if is_first() else None
    dist.gather_object(value, values, group=_Groups.agreement)
    return values or []


def end_all(message: str) -> None:
    """End every process, each of which has come here, with the one line of an `InputError`."""
    if is_first():
        raise InputError(message)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------------------ weights


class HalfPrecision(nn.Module):
    """A model that computes as ``--fp16`` says, with apex's meanings. Its outputs are losses and scores in float32.

    O1 and bf16: float32 weights, autocast. O2: float32 master weights, those of the model, and a half-precision copy of
    them that computes; gradients reach the masters through the cast. O3: weights in half precision, no masters.
    In all of them the choice head, a dot product, keeps float32: see docs/architecture.md.
    """

    def __init__(self, model: DoubleHeadsModel, device: str, fp16: str):
        super().__init__()
        self.model, self.device, self.fp16 = model, device, fp16
        self.copies = fp16 == "O2" and not is_sharded(model)  # there, sharding makes the copies

    def forward(self, **batch) -> DoubleHeadsOutput:
        if self.copies:
            half = half_dtype(self.device, self.fp16)
            copies = {name: weight.to(half) for name, weight in self.model.named_parameters() if not _of_choice(name)}
            return functional_call(self.model, copies, (), batch)
        with autocast(self.device, self.fp16 if self.fp16 in ("O1", "bf16") else ""):
            return self.model(**batch)


def prepare(model: DoubleHeadsModel, device: str, fp16: str = "", shard: bool = False, seed: int = 0) -> nn.Module:
    """The network that training calls: ``model`` on its device, in its precision, joined to those of other processes.

    With ``--shard`` each process holds a part of every weight, gradient and optimizer state, and gathers a block's
    weights while it computes (FSDP2); ``model``'s parameters become those parts. Otherwise each has all of them. From
    here on the random streams of processes differ, for their dropout.
    """
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # what is left in float32 need not be exact to the last bit
    model.to(device)
    half, world = half_dtype(device, fp16), idist.get_world_size()
    if fp16 == "O3":
        for name, weight in model.named_parameters():
            if not _of_choice(name):
                weight.data = weight.data.to(half)
    elif fp16 in ("O1", "bf16") and not shard and getattr(model, "peft_config", None):
        for layer in linear_layers(model):  # cast frozen weights once instead of in every forward pass
            if not layer.weight.requires_grad and isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.data.to(half)
    if shard and world > 1:
        mesh = DeviceMesh.from_group(_Groups.gradients, torch.device(device).type)
        masters = MixedPrecisionPolicy(half, torch.float32) if fp16 == "O2" else MixedPrecisionPolicy()
        blocks = next(part for part in model.base_model.modules() if isinstance(part, nn.ModuleList))
        fully_shard(model.multiple_choice_head, mesh=mesh)
        for part in (*blocks, model):
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


def loss_scaler(device: str, fp16: str) -> torch.amp.GradScaler:
    """Scales the loss where float16 gradients need it; bfloat16, also what CPUs compute in, has float32's range."""
    kind = torch.device(device).type
    return torch.amp.GradScaler(kind, enabled=fp16 in ("O1", "O2") and kind != "cpu")


def _usable_precision(device: str, fp16: str) -> str:
    """``fp16``, or with a warning what comes nearest to it on this device."""
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
    """A sharded tensor gathered from all processes, each of which must ask for it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of ``like`` and sharded as ``like`` is."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def _of_choice(name: str) -> bool:
    return name.startswith("multiple_choice_head.")


# ----------------------------------------------------------------------------------------------------- training


def scale_losses(out: DoubleHeadsOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """(lm_loss, mc_loss) twice: as this process should descend them, and of the whole batch, to be told.

    One is a mean over tokens and the other over turns, of which processes have different numbers; the gradient that
    they exchange is the mean of theirs. Each therefore weighs its losses by its own share of the batch's tokens or
    turns, times the number of processes: the mean gradient is then that of one process that has the whole batch.
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
    """The context of one batch's forward and backward pass; without ``now`` gradients stay in the process.

    Sharded ones are exchanged with every batch: to keep them whole would take the memory that sharding saves.
    """
    return nullcontext() if now or not isinstance(network, DistributedDataParallel) else network.no_sync()


def mean_over_turns(of: Callable[[DoubleHeadsOutput], torch.Tensor]) -> Metric:
    """The mean over all turns, in all processes, of ``of(output)``, which is (batch,)."""
    return MetricsLambda(float, Average(lambda out: of(out)[out.tokens > 0, None].double()))  # padding has no tokens


TRIMMED_EVERY = 8  # batches


def _give_memory_back() -> None:
    """Return the free pages of the heap to the system.

    glibc keeps what the tensors of one batch leave behind, which fits badly where the next batch has other lengths, so
    that the heap grows with every batch. On other systems this does nothing.
    """
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def within_memory(process: Callable, args: Namespace, training: bool = True) -> Callable:
    """``process(engine, batch)`` that says what to lower, and to what, when memory runs out."""

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
            cure = f"give fewer than {args.num_candidates} --num_candidates, a shorter --max_history, or --fp16 bf16"
        raise InputError(f"out of memory on a batch of {turns} turns, {positions} positions each; {cure}")

    return explained
