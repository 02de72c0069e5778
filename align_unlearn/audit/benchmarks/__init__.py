"""Benchmarks of the field, in their own formats. A new one is a file and a line in this table."""

from align_unlearn.audit.benchmarks import lm_eval_tasks, multiple_choice, muse, tofu
from align_unlearn.audit.benchmarks.benchmark import Benchmark, Limits, spread

BENCHMARKS: dict[str, Benchmark] = {
    "multiple_choice": Benchmark(
        multiple_choice.ask, multiple_choice.metrics, lambda given: [f"utility.{name}" for name in given]
    ),
    "open_answers": Benchmark(
        multiple_choice.ask_openly,
        multiple_choice.open_metrics,
        lambda given: [f"utility.{name}.open" for name in given],
    ),
    "tofu": Benchmark(tofu.ask, tofu.metrics, lambda given: [f"tofu.{name}" for name in tofu.FIGURES]),
    "muse": Benchmark(muse.ask, muse.metrics, muse.names),
    "lm_eval": Benchmark(lm_eval_tasks.ask, lm_eval_tasks.metrics, lm_eval_tasks.names),
}

__all__ = ["BENCHMARKS", "Benchmark", "Limits", "spread"]
