"""What tools/bench_throughput.py measures, one module a question."""
