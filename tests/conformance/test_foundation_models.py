"""Every method works on adapters of foundation models, or says in one error why it does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from conformance_federation import CONFIG, LITTLE_BERT, section, token_file

import fedfuse
from fedfuse.core.errors import FedfuseError
from fedfuse.core.registry import METHODS

CUTS = "a foundation model is not cut into blocks, and its channels are not matched"
TOKENS = "inputs that are tokens cannot be made by gradients"
CLASSES = "models that write or draw have no classes to combine"
NO_FEATURES = "the model is no classifier, so it has no features for a head"

ON_CLASSIFIERS = {
    **dict.fromkeys(["ccvr", "fafi", "feature_ensemble", "fedma", "fusefl", "otfusion"], CUTS),
    **dict.fromkeys(["adi", "coboosting", "dafl", "dense", "feddf", "intactofl"], TOKENS),
    "fedfisher": "the Fisher information of a foundation model is not computed",
    "fedsd2c": "fedsd2c sends images, and the models take inputs of shape (16,)",
    "heterotune": "a model with 1 layers has no 2 places for mixtures",
}


@pytest.mark.parametrize("name", METHODS.names())
def test_on_a_classifier_of_texts(name: str) -> None:
    pytest.importorskip("peft")
    data = {**CONFIG["data"], "source": "npz", "path": token_file(), "normalize": "none", "limit": 90, "test_limit": 30}
    table = {**CONFIG, "data": data, "model": LITTLE_BERT, "method": section(name)}
    if name in ON_CLASSIFIERS:
        with pytest.raises(FedfuseError) as caught:
            fedfuse.run(table)
        assert caught.value.what == ON_CLASSIFIERS[name]
        return
    result = fedfuse.run(table)
    assert result.accuracy is not None
    assert 0 <= result.accuracy <= 1


ON_LANGUAGE_MODELS = {
    **dict.fromkeys(["ccvr", "fafi", "feature_ensemble", "fedma", "fusefl", "otfusion"], CUTS),
    **dict.fromkeys(["adi", "coboosting", "dafl", "dense", "feddf", "intactofl"], TOKENS),
    **dict.fromkeys(["afl", "fedpft", "lda", "prototypes"], NO_FEATURES),
    **dict.fromkeys(["ensemble", "fens", "linear_weights", "voting"], CLASSES),
    "fedfisher": "the Fisher information of a foundation model is not computed",
    "fedsd2c": "fedsd2c sends images, and the models take inputs of shape (48,)",
    "pfedlora": "pfedlora averages the answers of classifiers, and a client's model is none",
    "heterotune": "a model with 1 layers has no 2 places for mixtures",
}


@pytest.mark.parametrize("name", METHODS.names())
def test_on_a_language_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lines = [f'{"ab"[k % 2]},"{k} and {k}?","it is {2 * k}"' for k in range(24)]
    (tmp_path / "sums.csv").write_text("\n".join(["owner,prompt,completion", *lines]), encoding="utf-8")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    table: dict[str, Any] = {
        "data": {
            "source": "text",
            "path": str(tmp_path / "sums.csv"),
            "tokenizer": "bytes",
            "max_length": 24,
            "test_fraction": 0.2,
            "group": "owner",
            "partition": {"scheme": "column", "column": "owner"},
        },
        "model": {
            "family": "transformers",
            "task": "causal_lm",
            "config": {"model_type": "llama", "vocab_size": 258, **sizes},
            "peft": {"kind": "lora", "rank": 2},
        },
        "method": section(name),
        "server": {"threads": 1},
    }
    if name in ON_LANGUAGE_MODELS:
        with pytest.raises(FedfuseError) as caught:
            fedfuse.run(table)
        assert caught.value.what == ON_LANGUAGE_MODELS[name]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fedfuse.run(table)
    assert result.accuracy is not None
    assert all(value > 1 for key, value in result.facts["metrics"].items() if key == "perplexity")
