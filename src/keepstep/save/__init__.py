"""One save: snapshot, write, report, commit. torch, but neither DeepSpeed nor the Trainer."""
