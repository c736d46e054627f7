"""Memory that ran out in training, said so that a user knows which options to turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hyperion_core.errors import TrainingError
from transformers import TrainingArguments

from .batches import Batching

# torch gives only CUDA's an exception class of its own
_SAID = ("can't allocate memory", "not enough memory", "out of memory")


def ran_out(error: BaseException) -> bool:
    """Whether it says that a device has no memory left."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _SAID)


@contextmanager
def out_of_memory_explained(args: TrainingArguments, longest: int, batching: Callable[[], Batching]) -> Iterator[None]:
    """Inside, an allocation that the device refuses is a TrainingError. `longest`: tokens of the longest row."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        capacity = batching().capacity
        if capacity is None:
            fewer_tokens = (
                f"make training.per_device_train_batch_size ({args.per_device_train_batch_size}) smaller and "
                f"training.gradient_accumulation_steps ({args.gradient_accumulation_steps}) larger by the same factor, "
            )
        else:  # a pack holds at least the longest row
            fewer_tokens = f"set training.pack_length below {capacity}, " if capacity > longest else ""
        raise TrainingError(
            f"{args.device} ran out of memory",
            why=str(error).partition("\n")[0],
            fix=f"{fewer_tokens}set training.gradient_checkpointing: true, or lower training.max_length; if it was "
            f"an evaluation, lower training.per_device_eval_batch_size ({args.per_device_eval_batch_size})",
        ) from error
