"""Counters of a server in Prometheus' text format."""

import threading
from collections import defaultdict
from collections.abc import Callable

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Thread-safe counters, gauges and histograms of seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._help: dict[str, tuple[str, str]] = {}
        self._counts: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
        self._gauges: dict[str, Callable[[], float]] = {}
        self._observed: dict[str, list[float]] = {}

    def counter(self, name: str, about: str) -> None:
        self._help[name] = ("counter", about)
        self._counts[name] = {}

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A value that is read when the metrics are."""
        self._help[name] = ("gauge", about)
        self._gauges[name] = read

    def histogram(self, name: str, about: str) -> None:
        self._help[name] = ("histogram", about)
        self._observed[name] = [0.0] * (len(SECONDS) + 2)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._counts[name][key] = self._counts[name].get(key, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            values = self._observed[name]
            for i, bound in enumerate(SECONDS):
                values[i] += seconds <= bound
            values[-2] += 1
            values[-1] += seconds

    def text(self) -> str:
        lines = []
        with self._lock:
            for name, (kind, about) in self._help.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
                if kind == "gauge":
                    lines.append(f"{name} {self._gauges[name]():g}")
                elif kind == "counter":
                    values = self._counts[name] or {(): 0}
                    lines += [f"{name}{_labels(key)} {value:g}" for key, value in sorted(values.items())]
                else:
                    *buckets, count, total = self._observed[name]
                    for bound, value in zip(SECONDS, buckets, strict=True):
                        lines.append(f'{name}_bucket{{le="{bound:g}"}} {value:g}')
                    lines.append(f'{name}_bucket{{le="+Inf"}} {count:g}')
                    lines += [f"{name}_sum {total:g}", f"{name}_count {count:g}"]
        return "\n".join(lines) + "\n"


def _labels(key: tuple[tuple[str, str], ...]) -> str:
    if not key:
        return ""
    escaped = ((k, v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for k, v in key)
    return "{" + ",".join(f'{k}="{v}"' for k, v in escaped) + "}"
