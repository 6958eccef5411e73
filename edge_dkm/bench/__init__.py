"""`edge-dkm bench`: how long each stage between camera and broker takes on this device with this model, and how much memory.

measure.py    puts the measurements together
stages.py     a frame through ring, inspector and outbox, one stage after the other; and through the line's own pipeline
profile.py    pre-processing, encoder and head inside the graph, from onnxruntime's profiler
nodes.py      which node of the graph belongs to which of them
arithmetic.py what the processor could do at best
publish.py    from the outbox through a broker to a subscriber
report.py     the result, for people and as JSON
"""

from edge_dkm.bench.measure import BenchOptions, bench
from edge_dkm.bench.report import BenchReport

__all__ = ["BenchOptions", "BenchReport", "bench"]
