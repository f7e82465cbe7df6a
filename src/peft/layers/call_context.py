# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What applies to one call of a model, and to nothing that runs beside it.

Layers are shared by all who use a model at the same time, so what belongs to a call, such as the adapter of each of
its samples, is not written on them. It stands in a context variable, of which each thread and each asyncio task has a
value of its own, and layers read it while they compute.

Checkpointed layers are computed again in the backward pass, when the call is over and maybe in another thread. So a
call that recorded gradients is found again through the outputs that it gave.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..utils.error import PeftIndexError, PeftTypeError, PeftValueError


class TaskIds(NamedTuple):
    """
    The task of each sample of a batch.

    Attributes:
        ids: (batch,) integers; negative ones count from the end.
        lowest: the least of them. They are looked at once, since each look would wait for a GPU.
        highest: the greatest of them.
    """

    ids: torch.Tensor
    lowest: int
    highest: int

    @classmethod
    def of(cls, given: "torch.Tensor | Sequence[int] | TaskIds") -> "TaskIds":
        """
        Take what a caller has given.

        Args:
            given: one number per sample.

        Raises:
            PeftTypeError: if it is anything else.
        """
        if isinstance(given, TaskIds):
            return given
        ids = torch.as_tensor(given)
        if ids.dim() != 1 or not len(ids) or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise PeftTypeError(
                "task_ids are integers, one for each sample of the batch; found a tensor of "
                f"{ids.dtype} and shape {tuple(ids.shape)}"
            )
        return cls(ids.long(), *(int(bound) for bound in ids.aminmax()))


@dataclass(eq=False)
class Call:
    """
    What applies to a call.

    Attributes:
        adapter_names: the adapter of each sample; None if all have those that are active.
        modules: ids of the modules that this is said to; a model that is called in between has modules of its own.
        task_ids: the task of each sample; None if nothing is said. Given as numbers.
        repeats: whether samples may come several times in a row, as with beams.
        notes: whoever notes something for the time of the call -> what it is.
        token: what the variable is given back its former value with.
    """

    adapter_names: Sequence[str] | None = None
    modules: Collection[int] = ()
    task_ids: TaskIds | None = None
    repeats: bool = False
    notes: Mapping[Any, Any] = field(default_factory=dict)
    token: Token | None = None

    def __post_init__(self) -> None:
        if self.task_ids is not None:
            self.task_ids = TaskIds.of(self.task_ids)

    def names_for(self, module: nn.Module, args: tuple) -> Sequence[str] | None:
        """
        Give the adapter of each row of a module's input; None if nothing is said about that module.

        Args:
            module: an adapter module.
            args: what it is called with by position.

        Raises:
            PeftValueError: if the input has another number of rows.
        """
        if self.adapter_names is None or id(module) not in self.modules:
            return None
        count = len(self.adapter_names)
        rows = len(args[0]) if args else count
        if self.repeats and rows % count == 0:
            return [name for name in self.adapter_names for _ in range(rows // count)]
        if rows != count:
            raise PeftValueError(f"adapter_names has {count} entries for a batch of {rows}; give one each")
        return self.adapter_names


_NOTHING = Call()
_MARK = "peft_call"
_call: ContextVar[Call] = ContextVar("peft_call", default=_NOTHING)
# Calls that run anywhere in the process. Most calls have nothing that applies to them, and are not among these; then
# layers need not ask for the variable, which compilers cannot read.
_running: dict[int, Call] = {}
# backward passes that run, by torch's number -> the call whose part they have come to
_backward: dict[int, Call] = {}
# not on the modules, which are copied and pickled
_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_making_locks = threading.Lock()


def current_call() -> Call | None:
    """Give what applies to the call that is computed, or computed again for its gradients; None if nothing does."""
    if not (_running or _backward):
        return None
    return _read()


@torch.compiler.disable
def _read() -> Call | None:
    call = _call.get()
    if call is _NOTHING:
        return _backward.get(torch._C._current_graph_task_id()) if _backward else None
    return call


def names_of_rows(module: nn.Module, args: tuple) -> Sequence[str] | None:
    """
    Give the adapter of each row of the input of a module, as the call that is computed says; see `Call.names_for`.

    Args:
        module: an adapter module.
        args: what it is called with by position.
    """
    call = current_call()
    return None if call is None else call.names_for(module, args)


def task_of_rows(x: torch.Tensor, n_tasks: int) -> torch.Tensor:
    """
    Give the task of each sample of a layer's input, as the call that is computed says.

    Args:
        x: (rows, ...), or (rows * length, features) of a model that flattens its batches.
        n_tasks: how many tasks there are. If there is one, nothing need be said.

    Returns:
        (batch,) integers. A multiple of so many rows are these samples' in this order, the same number for each.

    Raises:
        PeftIndexError: for a task that there is not.
        PeftValueError: if nothing is said, or not for this number of rows.
    """
    call = current_call()
    given = None if call is None else call.task_ids
    if given is None:
        if n_tasks == 1:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        raise PeftValueError(f"the adapter knows {n_tasks} tasks, so task_ids has to say which one each sample is")
    if given.highest >= n_tasks or given.lowest < -n_tasks:
        raise PeftIndexError(
            f"task_ids has to be below n_tasks={n_tasks}, found {given.lowest} to {given.highest}; tasks count from 0"
        )
    count = len(given.ids)
    if len(x) != count and (len(x) % count or not (call.repeats or x.dim() == 2)):
        raise PeftValueError(f"task_ids has {count} entries for a batch of {len(x)}; give one each")
    return given.ids


def begin(**changes: Any) -> Call:
    """
    Begin a call inside of the one that is being computed, or part of it; it has to be given to `end`.

    Args:
        changes: fields of `Call` that are others than in the outer call; `notes` are added to those of the outer one.
    """
    outer = current_call() or _NOTHING
    call = replace(outer, **{**changes, "notes": {**outer.notes, **changes.get("notes", {})}})
    _running[id(call)] = call
    call.token = _call.set(call)
    return call


def end(call: Call) -> None:
    """
    End what `begin` has begun.

    Args:
        call: what it gave.
    """
    _call.reset(call.token)
    del _running[id(call)]


def remember(call: Call, outputs: Any) -> None:
    """
    Let what is computed again in the backward pass find its call.

    Args:
        call: a call that recorded gradients.
        outputs: what it gave: tensors, in any structure.
    """
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    for node in (leaf.grad_fn for leaf in leaves if isinstance(leaf, torch.Tensor)):
        if node is not None and _MARK not in node.metadata:  # what a call inside of this one has given is that one's
            node.metadata[_MARK] = True
            node.register_prehook(partial(_come_to, call))


def _come_to(call: Call, gradients: Any) -> None:
    """Note that a backward pass has come to what a call has computed."""
    number = torch._C._current_graph_task_id()
    if number not in _backward:
        torch.autograd.Variable._execution_engine.queue_callback(partial(_backward.pop, number, None))
    _backward[number] = call


def alone_with(module: nn.Module) -> AbstractContextManager[Any]:
    """
    Wait until no other thread is inside of this for the same module, for what cannot be kept apart by contexts.

    Args:
        module: which something is going to stand in for the time of a call.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    with _making_locks:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def calling(**changes: Any) -> Iterator[Call]:
    """
    Compute what is inside as a call.

    Args:
        changes: see `begin`.
    """
    call = begin(**changes)
    try:
        yield call
    finally:
        end(call)


def call_with(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], **changes: Any) -> Any:
    """
    Compute a function as a call, which what is computed again in the backward pass finds too.

    Args:
        function: such as the forward pass of a model.
        args: for it.
        kwargs: for it.
        changes: see `begin`.
    """
    with calling(**changes) as call:
        outputs = function(*args, **kwargs)
        if torch.is_grad_enabled():
            remember(call, outputs)
        return outputs
