"""What is run on one GPU, in three parts: benchmarks/gpu.sh. See docs/performance.md."""
