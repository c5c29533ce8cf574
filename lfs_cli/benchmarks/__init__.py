"""What `lfs bench` measures: one file a benchmark, each with a baseline, a spread and the machine it ran on."""

from lfs_cli.benchmarks.measure import BENCHMARKS, Bench, Benchmark, Candidate, Measurement, Timing

__all__ = ["BENCHMARKS", "Bench", "Benchmark", "Candidate", "Measurement", "Timing"]
