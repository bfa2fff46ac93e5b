"""Counters and timings of a server, in the text format of Prometheus."""

import re
from collections import Counter
from collections.abc import Mapping

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, float("inf"))  # seconds
FAMILY = re.compile(r"(\w+?)(_(bucket|sum|count))?(\{.*)?")


class Metrics(Counter[str]):
    """Counters by Prometheus's name, such as `name_total{label="value"}`, and histograms of seconds."""

    def observe(self, name: str, seconds: float) -> None:
        for bound in BOUNDS:
            self[f'{name}_bucket{{le="{f"{bound:g}".replace("inf", "+Inf")}"}}'] += int(seconds <= bound)
        self[f"{name}_count"] += 1
        self[f"{name}_sum"] += seconds  # type: ignore[assignment]

    def text(self, gauges: Mapping[str, float]) -> str:
        """All counters and histograms, and the current values of these gauges."""
        families: dict[str, list[str]] = {}
        for series, value in {**self, **gauges}.items():
            name, kind = FAMILY.fullmatch(series).expand(r"\1 \3").split(" ")  # type: ignore[union-attr]
            kind = "gauge" if series in gauges else "histogram" if kind else "counter"
            families.setdefault(f"# TYPE {name} {kind}", []).append(f"{series} {value}")
        return "\n".join(line for head, lines in families.items() for line in (head, *lines)) + "\n"
