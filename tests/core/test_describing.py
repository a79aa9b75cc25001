"""What leaves a client, in words."""

from __future__ import annotations

import torch

from fedfuse.core.describing import UploadRow, refused_key, upload_rows
from fedfuse.core.payload import Payload

UPLOAD = Payload({"model/w": torch.zeros(2, 3), "model/n": torch.tensor(1), "num_examples": 12, "note": "hi"}).encode()
DECLARED = {"model/*": "weights", "num_examples": "how many examples"}


def test_every_key_with_its_size_and_what_the_task_says_of_it() -> None:
    assert upload_rows(UPLOAD, DECLARED) == [
        UploadRow("model/n", "int64", "one number", 8, "weights"),
        UploadRow("model/w", "float32", "2 x 3", 24, "weights"),
        UploadRow("note", "str", "hi", 2, ""),
        UploadRow("num_examples", "int", "12", 2, "how many examples"),
    ]


def test_keys_that_the_owner_keeps() -> None:
    assert refused_key(UPLOAD, ["moments/*", "num_examples"]) == "num_examples"
    assert refused_key(UPLOAD, ["moments/*"]) is None
    assert refused_key(UPLOAD, []) is None
