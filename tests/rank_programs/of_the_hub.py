"""The main job, with the environment's Hub: in a fork, its client was imported before."""

from __future__ import annotations

import os
import sys

from huggingface_hub import constants

from keepstep import train

constants.ENDPOINT, constants.HF_HUB_OFFLINE = os.environ["HF_ENDPOINT"], False
sys.exit(train.main(sys.argv[1:]))
