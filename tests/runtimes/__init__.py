"""One file, one answer: the same exported files and frames in several runtimes, each in an environment of its own, compared by the golden rule.

prepare.py    exported models, golden images, 1,000 further frames, override sets, answers of the newest onnxruntime -> a folder
runners/      one small script per runtime: reads that folder, writes its answers; needs that runtime and numpy, nothing of ours
compare.py    the rule of edge_dkm/golden.py on all of it
__main__.py   `python -m tests.runtimes`: runs the runners, compares, prints the table; `make runtimes`
oldest.py     what else must hold in the oldest onnxruntime, installed as the base install; `make oldest`
"""
