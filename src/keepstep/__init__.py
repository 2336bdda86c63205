"""keepstep: fine-tune language models; kill it at any moment, and the same command carries on.

Nothing heavy is imported here: `keepstep ls` must answer in well under a second.
"""

__version__ = "0.2.0.dev0"
