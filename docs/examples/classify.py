"""Classify a text with an exported model: classify.py MODEL_FOLDER TEXT_FILE [LIBRARY]."""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, text, *libraries = sys.argv[1:]
options = onnxruntime.SessionOptions()
for library in libraries:
    options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
manifest = json.load(open(f"{folder}/manifest.json"))
content = open(text, "rb").read().decode() or sys.exit("the document is empty")
ids = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(content, add_special_tokens=False).ids
chunk, outputs = manifest["chunk"], [x.name for x in session.get_outputs()]
dtypes = {"tensor(float)": np.float32, "tensor(double)": np.float64}
state = {x.name: np.zeros([1, *x.shape[1:]], dtypes[x.type]) for x in session.get_inputs()[4:]}
for start in range(0, len(ids), chunk):  # the state is all that one step needs of those before
    row = np.array(ids[start : start + chunk], np.int32)
    tokens, length = np.pad(row, (0, chunk - len(row)))[None], np.array([len(row)])
    step = {"tokens": tokens, "lengths": length, "document_of_row": length * 0}
    found = dict(zip(outputs, session.run(None, step | {"fresh": length == 0} | state)))
    state = {name: found[f"{name}_after"] for name in state}
config, logits = manifest["config"], found["logits"][0]
labels, multi = config["labels"], config.get("multi_label", False)
total = np.logaddexp(0, logits) if multi else np.logaddexp.reduce(logits)  # sigmoid, or softmax
least = config.get("thresholds") or [0.5 if multi else 0] * len(labels)
ranked = sorted(zip(np.exp(logits - total).tolist(), labels, least), reverse=True)
there = [name for x, name, threshold in ranked if x >= threshold]
best = ranked[0][1]
answer = {"labels": there} if multi else {"label": best if best in there else None}
print(json.dumps(answer | {"scores": {name: x for x, name, _ in ranked}}))
