"""Muon's functions are compiled when they are called, and not to learn that nobody calls them."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torch
from keepstep.sharding.muon import MODULE, import_muon
from deepspeed.runtime import compiler

torch.compiler.set_stance("force_eager")  # wrapped as ever, and run without a compiler
compile_now, before = compiler.compile, set(sys.modules)
import_muon()
muon = sys.modules[MODULE]
added = set(sys.modules) - before
assert added and not [name for name in added if name.startswith(("torch._ind", "torch._dyn"))]
assert compiler.compile is compile_now
names = [name for name in vars(muon) if hasattr(vars(muon)[name], "__wrapped__")]
assert len(names) >= 2 and "zeropower_via_newtonschulz5" in names, names
put_off = muon.zeropower_via_newtonschulz5
plain = put_off.__wrapped__
matrix = torch.randn(6, 4)
assert torch.equal(put_off(matrix, 5), plain(matrix, 5))
for name in names:  # all at once, as they would have been
    assert vars(muon)[name]._torchdynamo_orig_callable is not None
assert muon.zeropower_via_newtonschulz5._torchdynamo_orig_callable is plain
assert torch.equal(put_off(matrix, 5), plain(matrix, 5)), "whoever has imported it before"
import_muon()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print("done")
"""


def test_compiled_when_called() -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
