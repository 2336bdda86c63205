"""The main job on rank 0; the others never join: unjoined.py [fields of the recipe]."""

from __future__ import annotations

import os
import sys
import time

from keepstep import train

if os.environ["RANK"] != "0":
    time.sleep(600)
    sys.exit(1)
print("rank 0 waits for the others", flush=True)
sys.exit(train.main(sys.argv[1:]))
