"""The main job, asked for a stop while DeepSpeed compiles a part of itself: compiling.py SIGNAL
[fields of the recipe]. A launcher signals whole process groups: the compiler breaks off, and each
rank meets that in its own way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from keepstep import train
from keepstep.ranks import collectives, signals

name, *fields = sys.argv[1:]


def compile_a_part(*_: object) -> None:
    os.kill(os.getpid(), getattr(signal, name))
    if collectives.is_main():
        subprocess.run(["false"], check=True)  # the compiler's end
    raise ImportError("cannot open shared object file")  # that another rank waits for


signals.install_handlers()
train.build_trainer = compile_a_part  # type: ignore[assignment]
sys.exit(train.main(fields))
