"""Write a BERT for classification with random weights, and about as many parameters as `books`.

    python random_bert.py CHECKPOINT FOLDER

Its tokenizer is the checkpoint's, with the special tokens that BERT asks for; its vocabulary, width
and layers are the checkpoint's too. Run with the Python of the other servers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LONGEST = 512
SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}


def main(checkpoint: Path, folder: Path) -> None:
    told = json.loads((checkpoint / "config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"), model_max_length=LONGEST
    )
    tokenizer.add_special_tokens(SPECIAL)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=told["width"],
            num_hidden_layers=told["layers"],
            num_attention_heads=told["heads"],
            intermediate_size=4 * told["width"],
            max_position_embeddings=LONGEST,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(told["labels"])),
            label2id={label: n for n, label in enumerate(told["labels"])},
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
