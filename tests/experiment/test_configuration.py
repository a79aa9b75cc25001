"""From YAML to a checked configuration: every mistake is named with its place and its remedy."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedfuse.core.errors import ConfigError, FedfuseError, RegistryError
from fedfuse.core.registry import METHODS, MODELS, PARTITIONS, RUNTIMES, SOURCES
from fedfuse.experiment import folder_name, read_config, resolve

METHOD_NAMES = (
    "adaptor, adaptor_dtype, balance, feature_dropout, frozen_batchnorm, head, local, match_factor, name, num_blocks, "
    "points, width"
)
LOCAL_NAMES = (
    "batch_size, channels_last, compile, grad_clip_norm, learning_rate, momentum, num_epochs, optimizer, patience, "
    "precision, privacy, schedule, weight_decay"
)


def message(config: Any, *overrides: str) -> str:
    """What is said of a configuration that cannot be used."""
    with pytest.raises(FedfuseError) as caught:
        resolve(read_config(config, overrides))
    return str(caught.value)


# --- defaults


def test_the_smallest_configuration_is_filled_with_every_default() -> None:
    resolved = resolve(read_config({"data": {"source": "digits"}, "server": {"threads": 1}}))
    assert list(resolved) == ["seed", "data", "model", "method", "runtime", "federation", "server"]
    assert resolved["seed"] == 0
    assert resolved["data"] == {
        "source": "digits",
        "limit": None,
        "test_limit": None,
        "validation_fraction": 0.1,
        "normalize": "auto",
        "augment": "auto",
        "labels": {},
        "resize": None,
        "server": None,
        "late": {},
        "without": [],
        "partition": {"scheme": "iid", "num_clients": 5, "stratify": False},
    }
    assert resolved["model"] == {"family": "cnn", "width": 32, "depth": 4, "norm": "batch", "clients": {}}
    assert resolved["method"]["name"] == "fusefl"
    assert resolved["method"]["num_blocks"] == 4
    assert resolved["method"]["local"]["num_epochs"] == 20
    assert resolved["runtime"] == {"name": "local", "workers": None, "client_threads": 1, "device": "auto"}
    assert resolved["federation"] == {
        "quorum": 1.0,
        "timeout_s": None,
        "max_upload_bytes": 4 << 30,
        "clients": {},
        "late": "merge",
        "codec": "none",
        "secure_aggregation": None,
    }
    assert resolved["server"] == {"threads": 1, "device": "auto"}


def test_the_number_of_server_threads_is_written_down() -> None:
    assert resolve(read_config({"data": {"source": "digits"}}))["server"]["threads"] == os.cpu_count()


@pytest.mark.parametrize("method", METHODS.names())
def test_a_resolved_configuration_resolves_to_itself(config: dict[str, Any], method: str) -> None:
    config["model"]["clients"] = {"client_1": {"width": 5}}
    resolved = resolve(read_config({**config, "method": {"name": method}}))
    assert resolve(read_config(resolved)) == resolved
    text = yaml.safe_dump(resolved, sort_keys=False)
    assert resolve(read_config(yaml.safe_load(text))) == resolved


@pytest.mark.parametrize("family", MODELS.names())
def test_every_model_family_resolves_with_its_defaults(config: dict[str, Any], family: str) -> None:
    needed = {"path": "net.py"} if family == "python" else {}
    resolved = resolve(read_config({**config, "model": {"family": family, **needed}}))
    assert resolved["model"]["family"] == family
    assert resolve(read_config(resolved)) == resolved


def test_nothing_that_is_given_is_changed(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    resolve(read_config(config, ["method.local.num_epochs=7"]))
    assert config == before


def test_a_configuration_may_be_a_file_a_table_or_itself(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    wanted = resolve(read_config(config))
    assert resolve(read_config(path)) == wanted
    assert resolve(read_config(str(path))) == wanted
    assert resolve(read_config(read_config(config))) == wanted


# --- overrides


def test_overrides_win_and_later_ones_win_over_earlier_ones(config: dict[str, Any]) -> None:
    overrides = ["method.num_blocks=1", "seed=7", "method.local.learning_rate=0.5", "method.num_blocks=2"]
    resolved = resolve(read_config(config, overrides))
    assert (resolved["seed"], resolved["method"]["num_blocks"]) == (7, 2)
    assert resolved["method"]["local"]["learning_rate"] == 0.5
    assert resolved["method"]["local"]["num_epochs"] == 2


def test_overrides_take_yaml_values_and_make_tables_where_there_are_none(config: dict[str, Any]) -> None:
    overrides = [
        "data.limit=null",
        "data.normalize={mean: [0.5], std: [0.25]}",
        "model.clients.client_2.width=6",
        "federation.quorum=0.5",
        " runtime.workers = 2",
        "method.points=['1']",
    ]
    resolved = resolve(read_config(config, overrides))
    assert resolved["data"]["limit"] is None
    assert resolved["data"]["normalize"] == {"mean": [0.5], "std": [0.25]}
    assert resolved["model"]["clients"] == {"client_2": {"width": 6}}
    assert resolved["federation"]["quorum"] == 0.5
    assert resolved["runtime"]["workers"] == 2
    assert list(resolved["method"]["points"]) == ["1"]


@pytest.mark.parametrize("text", ["method.num_blocks", "=3", "  =3", ""])
def test_an_override_that_is_no_setting(config: dict[str, Any], text: str) -> None:
    assert message(config, text) == (
        f'"{text}" is no setting\n  where: --set\n  fix:   write key=value, or section.key=value'
    )


def test_an_override_that_is_no_yaml(config: dict[str, Any]) -> None:
    assert message(config, "seed=[1") == '"[1" is no YAML value\n  where: --set seed\n  fix:   quote it'


# --- unknown keys


@pytest.mark.parametrize(
    ("override", "where", "fix"),
    [
        (
            "sed=1",
            "sed",
            (
                'did you mean "seed"? known: attack, data, federation, method, methods, model, privacy, runtime, seed, '
                "server, upload"
            ),
        ),
        (
            "data.limt=3",
            "data.limt",
            (
                'did you mean "limit"? known: augment, labels, late, limit, normalize, partition, resize, server, '
                "source, test_limit, validation_fraction, without"
            ),
        ),
        (
            "data.partition.dirichlet_alfa=1",
            "data.partition.dirichlet_alfa",
            (
                'did you mean "dirichlet_alpha"? known: balanced, dirichlet_alpha, max_draws, min_examples, '
                "num_clients, scheme"
            ),
        ),
        ("model.widht=3", "model.widht", 'did you mean "width"? known: clients, depth, dropout, family, width'),
        ("model.famly=cnn", "model.famly", 'did you mean "family"? known: clients, depth, dropout, family, width'),
        (
            "model.clients.client_1.widht=3",
            "model.clients.client_1.widht",
            'did you mean "width"? known: clients, depth, dropout, family, width',
        ),
        ("method.num_block=3", "method.num_block", f'did you mean "num_blocks"? known: {METHOD_NAMES}'),
        ("method.local.num_epoch=3", "method.local.num_epoch", f'did you mean "num_epochs"? known: {LOCAL_NAMES}'),
        (
            "method.head.kin=lda",
            "method.head.kin",
            (
                'did you mean "kind"? known: features, kind, learning_rate, num_draws, num_epochs, per_class, priors, '
                "shrinkage"
            ),
        ),
        ("runtime.worker=3", "runtime.worker", 'did you mean "workers"? known: client_threads, device, name, workers'),
        (
            "federation.quorm=1",
            "federation.quorm",
            (
                'did you mean "quorum"? known: clients, codec, late, max_upload_bytes, quorum, '
                "secure_aggregation, timeout_s"
            ),
        ),
        ("server.thread=1", "server.thread", 'did you mean "threads"? known: device, threads'),
    ],
)
def test_an_unknown_key_anywhere_is_named_with_the_nearest_one(
    config: dict[str, Any], override: str, where: str, fix: str
) -> None:
    key = where.rsplit(".", 1)[-1]
    assert message(config, override) == f'unknown setting "{key}"\n  where: {where}\n  fix:   {fix}'


@pytest.mark.parametrize(
    ("override", "kind", "wrong", "nearest", "registry"),
    [
        ("data.source=digit", "source", "digit", "digits", SOURCES),
        ("data.partition.scheme=dirichle", "partition", "dirichle", "dirichlet", PARTITIONS),
        ("model={family: resnt}", "model", "resnt", "resnet", MODELS),
        ("method={name: fusfl}", "method", "fusfl", "fusefl", METHODS),
        ("runtime={name: loca}", "runtime", "loca", "local", RUNTIMES),
    ],
)
def test_an_unknown_name_is_named_with_the_nearest_one(
    config: dict[str, Any], override: str, kind: str, wrong: str, nearest: str, registry: Any
) -> None:
    with pytest.raises(RegistryError):
        resolve(read_config(config, [override]))
    known = ", ".join(registry.names())
    assert message(config, override) == (
        f'there is no {kind} "{wrong}"\n  fix:   did you mean "{nearest}"? known: {known}'
    )


def test_names_of_augmentation_and_normalisation_are_checked_before_any_data_is_read(config: dict[str, Any]) -> None:
    assert message(config, "data.augment=crp").startswith(
        'there is no augmentation "crp"\n  where: augment\n  fix:   did you mean "crop"? known: auto, crop, crop_flip'
    )
    assert message(config, "data.normalize=mnis").startswith(
        'there is no normalisation "mnis"\n  where: data.normalize\n  fix:   did you mean "mnist"? known: auto, '
    )


# --- wrong values

_FIX = "  fix:   see docs or fedfuse run --dry-run for what it can be"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("data.limit=0", f"input should be greater than 0, not 0\n  where: data.limit\n{_FIX}"),
        (
            "data.validation_fraction=1.5",
            f"input should be less than 1, not 1.5\n  where: data.validation_fraction\n{_FIX}",
        ),
        (
            "federation.quorum=2",
            f"input should be less than or equal to 1, not 2\n  where: federation.quorum\n{_FIX}",
        ),
        ("federation.timeout_s=0", f"input should be greater than 0, not 0\n  where: federation.timeout_s\n{_FIX}"),
        (
            "server.device=tpu",
            f"input should be 'auto', 'cpu' or 'cuda', not 'tpu'\n  where: server.device\n{_FIX}",
        ),
        (
            "method.adaptor=conv",
            f"input should be 'conv1x1', 'mean' or 'attention', not 'conv'\n  where: method.adaptor\n{_FIX}",
        ),
        ("method.num_blocks=0", "num_blocks is 0\n  where: method.num_blocks\n  fix:   give at least 1"),
        ("runtime.workers=0", "workers is 0\n  where: runtime.workers\n  fix:   give at least 1"),
        (
            "method=fusefl",
            "this is no table of settings: 'fusefl'\n  where: method\n  fix:   write it as {key: value, ...}",
        ),
        (
            "method.local=3",
            "this is no table of settings: 3\n  where: method.local\n  fix:   write it as {key: value, ...}",
        ),
        (
            "data.partition=3",
            "this is no table of settings: 3\n  where: data.partition\n  fix:   write it as {key: value, ...}",
        ),
        (
            "method={num_blocks: 2}",
            'the setting "name" is missing\n  where: method.name\n  fix:   give method.name a value',
        ),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_place(config: dict[str, Any], override: str, wanted: str) -> None:
    assert message(config, override) == wanted


@pytest.mark.parametrize("override", ["seed=abc", "method.num_blocks=x", "method.num_blocks=2.5", "data.limit=many"])
def test_a_text_where_a_whole_number_is_wanted(config: dict[str, Any], override: str) -> None:
    where, _, value = override.partition("=")
    said = message(config, override)
    assert said.startswith("input should be a valid integer")
    assert f"not {yaml.safe_load(value)!r}\n  where: {where}\n" in said


def test_a_union_is_named_by_its_setting(config: dict[str, Any]) -> None:
    assert "\n  where: method.width\n" in message(config, "method.width=mach")
    assert resolve(read_config(config, ["method.width=3"]))["method"]["width"] == 3
    assert resolve(read_config(config, ["method.width=match"]))["method"]["width"] == "match"


def test_a_partition_without_a_scheme(config: dict[str, Any]) -> None:
    known = ", ".join(PARTITIONS.names())
    assert message(config, "data.partition={num_clients: 3}") == (
        f'the setting "scheme" is missing\n  where: data.partition.scheme\n  fix:   known: {known}'
    )


def test_a_configuration_without_data() -> None:
    assert message({"seed": 1}) == 'the setting "data" is missing\n  where: data\n  fix:   give data a value'


# --- files that are none


def test_a_file_that_is_not_there() -> None:
    assert message("no/such.yaml") == (
        "cannot read the configuration: No such file or directory\n  where: no/such.yaml\n  fix:   name a YAML file"
    )


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert message(tmp_path).startswith("cannot read the configuration: Is a directory\n")


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00", b"a: b: c", b"!!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    said = message(path)
    assert said.startswith("the configuration is not YAML: ")
    assert said.endswith(f"\n  where: {path}\n  fix:   mend the place that is named")
    assert said.count("\n") == 2


@pytest.mark.parametrize("content", ["- 1\n- 2", "digits", "", "3"])
def test_a_file_that_holds_no_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    assert message(path) == (
        f"the configuration is no table\n  where: {str(path)[:80]}\n  fix:   begin with: data: {{source: digits}}"
    )


@pytest.mark.parametrize("given", [[], 3, None])
def test_an_object_that_is_no_configuration(given: Any) -> None:
    with pytest.raises(ConfigError, match="the configuration is no table"):
        read_config(given)


# --- the name of a run's folder


def test_the_same_configuration_has_the_same_folder_and_another_has_another(config: dict[str, Any]) -> None:
    name = folder_name(read_config(config))
    assert name.startswith("fusefl-digits-s2-")
    assert folder_name(read_config(copy.deepcopy(config))) == name
    assert folder_name(read_config(resolve(read_config(config)))) == name
    others = [folder_name(read_config(config, [o])) for o in ("seed=3", "method.num_blocks=1", "data.limit=201")]
    assert len({name, *others}) == 4
