"""Two processes of one run, started as torchrun starts them."""

import os
import signal
import subprocess
import sys

from clipkit.config import dump_config

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*arguments, cwd, **options):
    """Start two processes, in a group of their own so that a signal reaches all as Ctrl-C does."""
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def train_with_two(config, run, *more):
    """The two processes of a training run."""
    file = run.parent / f"{run.name}.toml"
    file.write_text(dump_config(config))
    return start("-m", "clipkit", "train", file, "--out", run, *more, cwd=run.parent)


def end(process, signals=()):
    """What was said on stderr, and the exit code; whatever happens, nothing is left running."""
    try:
        for number in signals:
            os.killpg(process.pid, number)
        return process.communicate(timeout=100)[1], process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
