"""What a run does about gradients that are not finite: it leaves steps out, then it goes back."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipkit.errors import TrainingError
from clipkit.models.checkpoint import checkpoint_step, run_checkpoints
from clipkit.training.run_directory import RunDirectory, planned_checkpoints

if TYPE_CHECKING:
    from clipkit.training.step import Learner


FIRST_BAD = (
    "the loss or its gradient is not finite, so step {step} changed nothing and the run goes on; "
    "`skipped_steps` counts such steps"
)


@dataclass
class Health:
    """How a run has fared, saved with each checkpoint.

    Attributes:
        skipped_steps: steps left out because their loss or gradient was not finite.
        bad_in_a_row: the last so many steps were.
        last_good: number of the last step that was not.
        returns: how often the run went back.
        rate: factor on the learning rate, lower after each return.
    """

    skipped_steps: int = 0
    bad_in_a_row: int = 0
    last_good: int = 0
    returns: int = 0
    rate: float = 1.0

    def note(self, step: int, finite: bool) -> None:
        """Count step number ``step``."""
        if finite:
            self.bad_in_a_row, self.last_good = 0, step
        else:
            self.bad_in_a_row += 1
            self.skipped_steps += 1


class Statistics:
    """The running statistics of batch normalisation, which a step left out must not change.

    Args:
        network: whose.
    """

    def __init__(self, network: nn.Module) -> None:
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._live: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._live]

    def keep(self) -> None:
        """Remember them as they are."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def put_back(self) -> None:
        """Make them what they were."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


def go_back(
    run: RunDirectory, learner: "Learner", step: int, broken: bool
) -> tuple[dict[str, Any], str]:
    """Take a run back to its last good checkpoint, with a lower learning rate.

    A checkpoint from which no step with a finite gradient was taken may hold the very weights that
    fail, so it is no good, and it is removed. Without a good one, the run goes back to its
    initial weights. What follows is deterministic: the same batches, at the lower rate.

    Args:
        run: its directory.
        learner: what is trained; its weights, optimiser and health are changed.
        step: the last step taken.
        broken: it is the weights, or the vectors of held-out pairs, that are not finite.

    Returns:
        the training state of that checkpoint (empty for the initial weights), and a sentence
        about what was done.

    Raises:
        TrainingError: the run was rolled back ``train.max_rollbacks`` times already, or never
            had a finite gradient.
    """
    config, health = learner.config.train, learner.health
    what = f"no finite loss or gradient in the {health.bad_in_a_row} steps up to step {step}"
    if broken:
        what = f"the model's weights or its vectors are not finite after step {step}"
    require_finite_steps(health, what)
    if health.returns >= config.max_rollbacks:
        raise TrainingError(
            f"{what}, after {health.returns} returns to an earlier state and with "
            f"{health.rate:g} times the learning rate; lower optim.lr (it is "
            f"{learner.config.optim.lr:g}) or set train.precision to fp32, and start a new run "
            f"(with model.init_from={run.path} it goes on from the last checkpoint)"
        )
    good = good_checkpoints(run, health)
    for path in run_checkpoints(run.path):
        if path not in good:
            run.remove(path)
    name = learner.world.broadcast(good[-1].name if good else "")
    state = learner.restore(run.path / name) if name else learner.start_over()
    learner.health = replace(
        health,
        bad_in_a_row=0,
        last_good=state.get("step", 0),
        returns=health.returns + 1,
        rate=health.rate * config.rollback_lr_factor,
    )
    place = f"step {state['step']}" if name else "the initial weights"
    return state, (
        f"{what}: going back to {place}, from there on with {learner.health.rate:g} times the "
        f"learning rate (return {learner.health.returns} of at most {config.max_rollbacks}); lower "
        "optim.lr if this does not help"
    )


def place_to_return(run: RunDirectory, health: Health) -> int | None:
    """The step of the checkpoint that a run with bad steps may have to go back to."""
    good = good_checkpoints(run, health) if health.bad_in_a_row else []
    return checkpoint_step(good[-1]) if good else None


def good_checkpoints(run: RunDirectory, health: Health) -> list[Path]:
    """The planned checkpoints of a run from which a step with a finite gradient was taken."""
    planned = planned_checkpoints(run.path)
    return [path for path in planned if checkpoint_step(path) < health.last_good]


def require_finite_steps(health: Health, what: str) -> None:
    """Raise TrainingError if not one step of a run had a finite gradient."""
    if not health.last_good:
        raise TrainingError(
            f"{what}, and none before, expected some from random weights; set train.precision to "
            "fp32, lower optim.lr, or look for what is wrong with the pairs (clipkit data check)"
        )
