"""What a server counts and times, in the text format of Prometheus."""

from bisect import bisect_left
from collections import Counter, defaultdict

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds


class Metrics:
    """Counters by name and labels, and histograms of seconds by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # by `name{label="value"}`, as Prometheus writes it
        self._held: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(BOUNDS) + 1))
        self._sums: Counter[str] = Counter()

    def observe(self, name: str, seconds: float) -> None:
        self._held[name][bisect_left(BOUNDS, seconds)] += 1
        self._sums[name] += seconds

    def text(self, gauges: dict[str, float]) -> str:
        """Everything so far, and these values of now."""
        lines, typed = [], set[str]()
        for kind, values in (("counter", dict(self.counts)), ("gauge", gauges)):
            for series in sorted(values):
                if (name := series.partition("{")[0]) not in typed:
                    lines.append(f"# TYPE {name} {kind}")
                    typed.add(name)
                lines.append(f"{series} {values[series]:g}")
        for name, held in sorted(self._held.items()):
            lines.append(f"# TYPE {name} histogram")
            sums = [sum(held[: place + 1]) for place in range(len(held))]
            bounds = [*map("{:g}".format, BOUNDS), "+Inf"]
            lines += [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, sums, strict=True)]
            lines += [f"{name}_sum {self._sums[name]:.6f}", f"{name}_count {sums[-1]}"]
        return "\n".join(lines) + "\n"
