"""Recovery from non-finite weights and gradients: roll back to the last good checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clipkit.errors import TrainingError
from clipkit.models.checkpoint import checkpoint_step, run_checkpoints
from clipkit.training.run_directory import RunDirectory, planned_checkpoints
from clipkit.training.step import RecoveryState, Trainer


def roll_back(run: RunDirectory, trainer: Trainer, reason: str) -> tuple[dict[str, Any], str]:
    """Restore the last good checkpoint of a run, with a lower learning rate.

    A checkpoint that no finite step followed may hold the very weights that fail: it is not good,
    and it is removed. Without a good one, the run returns to its initial weights. What follows is
    deterministic: the same batches, at the lower learning rate.

    Args:
        run: its directory.
        trainer: its weights, optimizer and recovery state are changed.
        reason: what is not finite, for the messages.

    Returns:
        the training state of the checkpoint (empty for the initial weights), and a warning that
        says what was done.

    Raises:
        TrainingError: the run was rolled back ``train.max_rollbacks`` times already, or never had
            a finite gradient.
    """
    config, recovery = trainer.config.train, trainer.recovery
    require_finite_steps(recovery, reason)
    if recovery.rollbacks >= config.max_rollbacks:
        raise TrainingError(
            f"{reason}, after {recovery.rollbacks} rollbacks and with {recovery.lr_factor:g} times "
            f"the learning rate; lower optim.lr (now {trainer.config.optim.lr:g}) or set "
            f"train.precision to fp32, and start a new run (model.init_from={run.path} continues "
            "from the last checkpoint)"
        )
    name = ""
    # The others would read checkpoints while the main process removes them.
    if trainer.world.is_main_process:
        good = _good_checkpoints(run, recovery)
        for path in run_checkpoints(run.path):
            if path not in good:
                run.remove(path)
        name = good[-1].name if good else ""
    name = trainer.world.broadcast(name)
    state = trainer.restore(run.path / name) if name else trainer.restart()
    trainer.recovery = replace(
        recovery,
        consecutive_skipped=0,
        last_finite_step=state.get("step", 0),
        rollbacks=recovery.rollbacks + 1,
        lr_factor=recovery.lr_factor * config.rollback_lr_factor,
    )
    place = f"step {state['step']}" if name else "the initial weights"
    return state, (
        f"{reason}: rolling back to {place} with {trainer.recovery.lr_factor:g} times the learning "
        f"rate (rollback {trainer.recovery.rollbacks} of at most {config.max_rollbacks}); lower "
        "optim.lr if this does not help"
    )


def last_good_checkpoint(run: RunDirectory, trainer: Trainer) -> int | None:
    """The step of the checkpoint that a run with skipped steps may have to roll back to."""
    recovery = trainer.recovery
    good = _good_checkpoints(run, recovery) if recovery.consecutive_skipped else []
    return checkpoint_step(good[-1]) if good else None


def _good_checkpoints(run: RunDirectory, recovery: RecoveryState) -> list[Path]:
    """The planned checkpoints of a run that a finite step followed."""
    planned = planned_checkpoints(run.path)
    return [path for path in planned if checkpoint_step(path) < recovery.last_finite_step]


def require_finite_steps(recovery: RecoveryState, reason: str) -> None:
    """Raise TrainingError if no step of a run had a finite gradient."""
    if not recovery.last_finite_step:
        raise TrainingError(
            f"{reason}, and none before; set train.precision to fp32, lower optim.lr, or check the "
            "pairs with clipkit data check"
        )
