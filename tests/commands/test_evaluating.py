from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedfuse.cli import app
from fedfuse.commands.evaluating import evaluate_artifact, tell
from fedfuse.core.artifact import Artifact, ModelSpec
from fedfuse.core.errors import ConfigError, DataError, ModelError
from fedfuse.experiment import run

LLAMA = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "eos_token_id": 257,
}


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """Says cat where the first of two features is the larger one, dog else."""
    recipe = {"kind": "model", "family": "mlp", "settings": {"depth": 0}, "input_shape": [2], "num_classes": 2}
    spec = ModelSpec(recipe=recipe, seed=0, input_shape=(2,), num_classes=2)
    module = spec.build()
    state = {key: torch.zeros_like(value) for key, value in module.state_dict().items()}
    (weight,) = (key for key in state if key.endswith("weight"))
    state[weight] = torch.eye(2)
    artifact = Artifact.of(spec, state)
    info = {"input_shape": [2], "class_names": ["cat", "dog"]}
    return Artifact(artifact.recipe, artifact.state, info=info).save(tmp_path / "classifier")


def test_classes_are_found_by_their_names(classifier: Path, tmp_path: Path) -> None:
    # dog is class 0 of this file, and cat is not in it.
    rows = np.array([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]], dtype=np.float32)
    np.savez(tmp_path / "dogs.npz", x=rows, y=np.array(["dog", "dog", "dog"]))
    found = evaluate_artifact(classifier, str(tmp_path / "dogs.npz"))["data"]
    assert (found["name"], found["part"], found["num_examples"]) == ("dogs", "all examples", 3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    # Cross-entropy of a margin m is log(1 + exp(-m)).
    margins = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    assert found["loss"] == pytest.approx(float(torch.log1p(torch.exp(-margins)).mean()), abs=1e-6)
    assert evaluate_artifact(classifier, str(tmp_path / "dogs.npz"), limit=2)["data"]["accuracy"] == 1.0


def test_the_test_part_is_used_where_there_is_one(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.array([[1.0, 0.0]], dtype=np.float32)
    np.savez(tmp_path / "two.npz", x=rows, y=np.array(["dog"]), x_test=rows, y_test=np.array(["cat"]))
    found = evaluate_artifact(classifier, str(tmp_path / "two.npz"))
    tell(found, tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[:3] == [["two,", "test", "part:", "1", "examples"], ["accuracy", "100.0", "%"], ["loss", "0.31"]]


def _error(kind: type[Exception], *given: Any, **settings: Any) -> str:
    with pytest.raises(kind) as error:
        evaluate_artifact(*given, **settings)
    return str(error.value)


def test_what_does_not_fit_is_refused(classifier: Path, tmp_path: Path) -> None:
    assert _error(ConfigError, classifier) == (
        "nothing says what to evaluate on\n  where: fedfuse evaluate\n  fix:   give --data or --lm-eval"
    )
    np.savez(tmp_path / "wide.npz", x=np.zeros((1, 3), dtype=np.float32), y=np.array(["cat"]))
    assert _error(DataError, classifier, str(tmp_path / "wide.npz")) == (
        "the inputs have shape (3,), and the model takes (2,)\n  where: --data\n"
        "  fix:   read them as the model's own data were read; give settings of the source by --set"
    )
    np.savez(tmp_path / "owls.npz", x=np.zeros((1, 2), dtype=np.float32), y=np.array(["owl"]))
    assert _error(DataError, classifier, str(tmp_path / "owls.npz")).startswith(
        'the label "owl" is none of the 2 classes: cat, dog'
    )
    assert _error(ModelError, classifier, tasks=["piqa"]).startswith("the model writes no text")


def test_a_language_model_is_read_as_it_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    rows = [{"task": f"t{i % 2}", "prompt": f"q{i}", "completion": "yes"} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for part in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{part}.jsonl").write_text(lines)
    text = {"source": "text", "path": str(tmp_path / "data"), "tokenizer": "bytes", "max_length": 12, "group": "task"}
    model = {"family": "transformers", "task": "causal_lm", "config": LLAMA, "tokenizer": "bytes", "num_generated": 2}
    result = run(
        {
            "data": {**text, "partition": {"scheme": "column", "column": "task"}},
            "model": {**model, "peft": {"kind": "lora", "rank": 2}},
            "method": {"name": "fedavg", "local": {"num_epochs": 1}},
        },
        out=tmp_path / "run",
    )
    # The artifact knows the tokenizer and the length; all that is new is where the texts lie.
    found = evaluate_artifact(tmp_path / "run", str(tmp_path / "data"))["data"]
    assert found["num_examples"] == 8
    assert found["loss"] == pytest.approx(result.facts["loss"])
    assert {name: found[name] for name in result.facts["metrics"]} == pytest.approx(result.facts["metrics"])
    assert sorted(result.facts["metrics"]) == ["exact_match", "perplexity", "rouge_1", "rouge_l"]
    silent = evaluate_artifact(tmp_path / "run", str(tmp_path / "data" / "train.jsonl"), num_answers=0)["data"]
    assert (silent["name"], silent["part"]) == ("train", "all examples")
    assert "rouge_l" not in silent


def test_the_command(classifier: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", pixels=np.array([[2.0, 1.0]], dtype=np.float32), y=np.array(["cat"]))
    given = ["evaluate", str(classifier), "--data", str(tmp_path / "one.npz"), "--set", "x_key=pixels"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[1].split() == ["accuracy", "100.0", "%"]
