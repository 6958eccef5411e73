"""The twelve lines that must work from any language binding, on one exported file: `twelve_lines.py MODEL PART.png`; prints one line of JSON."""

import json
import sys

import cv2
import numpy as np
import onnxruntime as ort

ort.set_default_logger_severity(3)

s = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
meta = s.get_modelmeta().custom_metadata_map
names = {c["id"]: c["name"] for c in json.loads(meta["dkm.clusters"])}
spec = json.loads(meta["dkm.input"])
frame = cv2.imread(sys.argv[2])
if spec["h"] is not None:
    assert frame.shape == (spec["h"], spec["w"], 3)
cid, score, novel = s.run(["cluster_id", "novelty_score", "is_novel"], {"image": frame[None]})
edge = [
    s.run(["is_novel"], {"image": frame[None], "novelty_threshold": np.array([score[0] * k], np.float32)})[0][0]
    for k in (0.9, 1.1)
]
answer = [names[int(cid[0])], float(score[0]), bool(novel[0]), *map(bool, edge)]
print(json.dumps({"answer": answer, "onnxruntime": ort.__version__, "numpy": np.__version__, "cv2": cv2.__version__}))
