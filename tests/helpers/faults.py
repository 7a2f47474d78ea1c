"""Methods that fail, processes that are killed, disks that are full."""

import os
import shutil
import subprocess


class SmallDisk:
    """A disk of its own, which can be filled and grown."""

    def __init__(self, path):
        self.path = path

    def fill(self, leaving):
        """Take all room but so many bytes."""
        self.path.joinpath("filler").write_bytes(
            b"\0" * (shutil.disk_usage(self.path).free - leaving)
        )

    def make_room(self):
        (self.path / "filler").unlink()

    def grow(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)


def dies(monkeypatch, owner, method, time=1, error=None):
    """Let a method raise when it is called for the ``time``-th time."""
    plain, left = getattr(owner, method), [time]

    def deadly(*args, **settings):
        left[0] -= 1
        if not left[0]:
            raise error or RuntimeError("killed")
        return plain(*args, **settings)

    monkeypatch.setattr(owner, method, deadly)


def in_a_child(action):
    """Run ``action`` in a fork of this process, which has everything loaded; how it ended."""
    child = os.fork()
    if not child:
        status = 70
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]
