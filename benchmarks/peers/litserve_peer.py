"""A classifier behind LitServe, as its documentation has one: batches, and texts cut at 512 tokens.

    python litserve_peer.py MODEL PORT THREADS

Run with the Python of the other servers.
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH, WAIT_S = 32, 0.005


class Classifier(litserve.LitAPI):
    """One text in, all scores out."""

    def setup(self, device: str) -> None:
        torch.set_num_threads(int(sys.argv[3]))
        self.tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        self.model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()

    def decode_request(self, request: dict[str, str]) -> str:
        return request["text"]

    def batch(self, inputs: list[str]) -> list[str]:
        return list(inputs)

    @torch.inference_mode()
    def predict(self, texts: list[str]) -> list[list[float]]:
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        scores: list[list[float]] = self.model(**tokens).logits.softmax(-1).tolist()
        return scores

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        names = self.model.config.id2label
        best = sorted(range(len(output)), key=lambda n: -output[n])
        return {"scores": [{"label": names[n], "score": output[n]} for n in best]}


if __name__ == "__main__":
    api = Classifier(max_batch_size=BATCH, batch_timeout=WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        log_level="warning",
        generate_client_file=False,
    )
