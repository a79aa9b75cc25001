"""A federation by hand gives the model of the simulation, bit for bit, and refuses what is not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedfuse.commands.membership import add_client, remove_client
from fedfuse.commands.splitting import split
from fedfuse.core.errors import ConfigError, FedfuseError, SealError, UploadRefused
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, read_sealed, seal
from fedfuse.experiment import Config, read_config, run
from fedfuse.experiment.contributing import Contributed, agreement_of, contribute, default_home, own_data
from fedfuse.experiment.inbox import InboxResult, fuse_inbox

NAMES = ("a", "b", "c")
TABLE: dict[str, Any] = {
    "seed": 2,
    "data": {
        "source": "digits",
        "limit": 300,
        "test_limit": 100,
        "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.5},
    },
    "model": {"family": "cnn", "width": 4, "depth": 4},
    "method": {"name": "fedavg", "local": {"num_epochs": 4}},
    "server": {"threads": 1},
}


class Federation:
    """Client files, an inbox and a server's folder."""

    def __init__(self, home: Path, table: dict[str, Any] = TABLE, **method: Any) -> None:
        self.home = home
        self.simulation = read_config({**table, "method": {**table["method"], **method}})
        split(self.simulation, home / "split")
        self.config = read_config(home / "split" / "federation.yaml")
        self.names = sorted(self.config.federation.clients)

    def contribute(self, name: str, file: str, **settings: Any) -> Contributed:
        config = settings.pop("config", self.config)
        return contribute(
            config,
            name,
            self.home / "split" / f"{name}.npz",
            out=str(self.home / "inbox" / f"{file}.fed"),
            home=self.home / "homes" / name,
            **settings,
        )

    def fuse(self, out: str = "run", config: Config | None = None) -> InboxResult:
        (self.home / "inbox").mkdir(exist_ok=True)
        return fuse_inbox([str(self.home / "inbox")], config or self.config, self.home / out)

    def carry(self, limit: int = 10) -> InboxResult:
        """Everybody answers every request until there is a result."""
        for name in self.names:
            self.contribute(name, f"0_{name}")
        found = self.fuse()
        for exchange in range(1, limit):
            if found.result is not None:
                return found
            for name in self.names:
                self.contribute(name, f"{exchange}_{name}", request=str(found.request), config=None)
            found = self.fuse()
        raise AssertionError("no end")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedavg"},
        {"name": "fedavg", "num_rounds": 2},
        {"name": "fusefl", "num_blocks": 4},
        {"name": "dense", "synthesis": {"num_epochs": 2, "num_steps": 2, "batch_size": 16, "width": 8}},
    ],
    ids=["fedavg", "two rounds", "fusefl", "dense"],
)
def test_the_digest_is_that_of_the_simulation(method: dict[str, Any], tmp_path: Path) -> None:
    federation = Federation(tmp_path, **method)
    simulated = run(federation.simulation)
    found = federation.carry()
    assert found.result is not None
    assert found.result.artifact is not None
    assert simulated.artifact is not None
    assert found.result.artifact.digest() == simulated.artifact.digest()
    assert found.result.accuracy == simulated.accuracy
    assert (found.missing, found.refused, list(found.unasked)) == ({}, {}, [])
    counts = {name: facts["num_examples"] for name, facts in simulated.clients.items()}
    assert {name: facts["num_examples"] for name, facts in found.result.clients.items()} == counts


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedit"},
        {"name": "flora", "num_rounds": 2},
        {"name": "fedex_lora", "num_rounds": 2},
        {"name": "fed_sb"},
    ],
    ids=["fedit", "flora", "fedex_lora", "fed_sb"],
)
def test_adapters_of_a_language_model_travel_by_hand_too(method: dict[str, Any], tmp_path: Path) -> None:
    for module in ("transformers", "peft", "pandas"):
        pytest.importorskip(module)
    lines = [f'{"abc"[k % 3]},"What is {k} and {k}?","It is {2 * k}."' for k in range(30)]
    (tmp_path / "sums.csv").write_text("\n".join(["owner,prompt,completion", *lines]), encoding="utf-8")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    table = {
        "seed": 2,
        "data": {
            "source": "text",
            "path": str(tmp_path / "sums.csv"),
            "tokenizer": "bytes",
            "max_length": 48,
            "test_fraction": 0.2,
            "partition": {"scheme": "column", "column": "owner"},
        },
        "model": {
            "family": "transformers",
            "task": "causal_lm",
            "config": {"model_type": "llama", "vocab_size": 258, **sizes},
            "peft": {"kind": "lora", "rank": 2},
        },
        "method": {"name": "fedit", "local": {"num_epochs": 2, "batch_size": 8, "optimizer": "adamw"}},
        "server": {"threads": 1},
    }
    federation = Federation(tmp_path, table, **method)
    simulated = run(federation.simulation)
    found = federation.carry()
    assert found.result is not None
    assert found.result.artifact is not None
    assert simulated.artifact is not None
    assert found.result.artifact.digest() == simulated.artifact.digest()
    assert found.result.facts["metrics"] == simulated.facts["metrics"]
    assert federation.names == ["a", "b", "c"]


def test_another_method_over_the_same_files_costs_no_client_anything(federation: Federation) -> None:
    assert federation.carry().result is not None
    files = sorted((federation.home / "inbox").iterdir())
    table = federation.config.model_dump()
    other = read_config({**table, "method": {"name": "ensemble", "local": TABLE["method"]["local"]}})
    found = federation.fuse("ensemble", other)
    assert found.result is not None
    simulated = run({**TABLE, "method": {**TABLE["method"], "name": "ensemble"}})
    assert found.result.facts["artifact"]["digest"] == simulated.facts["artifact"]["digest"]
    assert sorted((federation.home / "inbox").iterdir()) == files


def test_says_who_is_missing_and_goes_on_when_more_arrives(federation: Federation) -> None:
    first, second, third = federation.names
    assert federation.fuse().missing == dict.fromkeys(federation.names, "nothing came from it")
    federation.contribute(first, "x")
    federation.contribute(second, "y")
    found = federation.fuse()
    assert (found.result, found.missing, list(found.contributed)) == (
        None,
        {third: "nothing came from it"},
        [first, second],
    )
    # What was taken in counts, also where the files are gone.
    federation.contribute(third, "z")
    assert federation.fuse().result is not None
    for file in (federation.home / "inbox").iterdir():
        file.unlink()
    again = federation.fuse()
    assert again.result is not None
    assert again.result.accuracy == run(federation.simulation).accuracy


def test_a_quorum_goes_on_without_the_missing_and_takes_them_in_later(federation: Federation) -> None:
    table = federation.config.model_dump()
    config = read_config({**table, "federation": {**table["federation"], "quorum": 0.6}})
    first, second, third = federation.names
    for name in (first, second):
        federation.contribute(name, name)
    without = federation.fuse(config=config)
    assert without.result is not None
    assert without.missing == {third: "nothing came from it"}
    federation.contribute(third, third)
    whole = federation.fuse(config=config)
    assert whole.result is not None
    assert whole.result.facts["artifact"]["digest"] == run(federation.simulation).facts["artifact"]["digest"]
    assert whole.result.facts["artifact"]["digest"] != without.result.facts["artifact"]["digest"]


def refused(federation: Federation) -> dict[str, str]:
    return {Path(place).name: reason for place, reason in federation.fuse().refused.items()}


def test_files_that_are_not_right_are_refused_with_the_reason_and_cost_nothing_else(federation: Federation) -> None:
    first, second = federation.names[:2]
    inbox = federation.home / "inbox"
    for name in federation.names:
        federation.contribute(name, name)
    good = (inbox / f"{first}.fed").read_bytes()
    (inbox / "cut.fed").write_bytes(good[:-100])
    changed = bytearray(good)
    changed[-1] ^= 1
    (inbox / "damaged.fed").write_bytes(bytes(changed))
    (inbox / "garbage.fed").write_bytes(b"\x00" * 1000)
    (inbox / "empty.fed").write_bytes(b"")
    stranger = SigningKey.generate()
    manifest = dict(read_sealed(inbox / f"{second}.fed", max_bytes=10**9).manifest)
    (inbox / "z_forged.fed").write_bytes(seal(manifest, {"upload": Payload({"n": 1}).encode()}, stranger))
    (inbox / "z_nobody.fed").write_bytes(seal({**manifest, "client": "nobody"}, {"upload": b""}, stranger))
    (inbox / "z_traversal.fed").write_bytes(seal({**manifest, "client": "../x"}, {"upload": b""}, stranger))
    (inbox / "z_hollow.fed").write_bytes(seal({"kind": "contribution", "client": first}, {"upload": b""}, stranger))
    (inbox / "z_request.fed").write_bytes(seal({"kind": "request"}, {}, stranger))
    (inbox / "twice.fed").write_bytes(good)
    start = "the sealed message was refused: "
    assert refused(federation) == {
        "cut.fed": f"{start}the bytes are not a payload: its tensors take 7,416 bytes, 7,316 are there",
        "damaged.fed": f'{start}the part "upload" was changed or damaged',
        "garbage.fed": f"{start}the bytes are not a payload: the header is not JSON",
        "empty.fed": f"{start}the bytes are not a payload: 0 bytes with a header of 0",
        "z_forged.fed": f'the name "{second}" is another\'s: the key is not the one that the server knows for it',
        "z_nobody.fed": 'no client "nobody" is expected',
        "z_traversal.fed": "'../x' is no client id",
        "z_hollow.fed": "its manifest is no contribution's",
        "z_request.fed": "this is a 'request', no contribution",
    }
    result = federation.fuse().result
    assert result is not None
    assert result.facts["artifact"]["digest"] == run(federation.simulation).facts["artifact"]["digest"]


def test_the_operators_keys_are_the_only_ones(federation: Federation) -> None:
    first = federation.names[0]
    keys = {name: SigningKey.generate().public_key for name in federation.names}
    table = federation.config.model_dump()
    config = read_config({**table, "federation": {**table["federation"], "clients": keys}})
    federation.contribute(first, first)
    found = federation.fuse(config=config)
    reason = f'the name "{first}" is another\'s: the key is not the one that the server knows for it'
    assert list(found.refused.values()) == [reason]
    wrong = read_config({**table, "federation": {**table["federation"], "clients": {first: "abc"}}})
    with pytest.raises(ConfigError, match="'abc' is no public key"):
        federation.fuse(config=wrong)


def test_an_answer_to_an_old_question_is_not_taken(federation: Federation) -> None:
    table = federation.config.model_dump()
    old = read_config({**table, "seed": 1})
    for name in federation.names:
        federation.contribute(name, name, config=old)
    found = federation.fuse()
    assert found.result is None
    assert sorted(Path(place).name for place in found.unasked) == [f"{name}.fed" for name in federation.names]
    assert found.missing == dict.fromkeys(federation.names, 'its answer to "local_models" is not there')
    # Another seed sets other examples apart, so the request that was written does not fit either.
    with pytest.raises(SealError, match="the request was made for other data, threads or device than you have now"):
        federation.contribute("client_0", "x", request=str(found.request))
    for name in federation.names:
        federation.contribute(name, f"again_{name}")
    assert federation.fuse().result is not None


def poisoned(name: str, upload: Payload) -> Payload:
    if name == "nan":
        upload["model/0"] = torch.full((2,), float("nan"))
    if name == "undeclared":
        upload["secret/0"] = torch.zeros(2)
    return upload


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("nan", "holds NaN or infinite values|was not expected"), ("undeclared", "the key was not declared")],
)
def test_a_signed_upload_is_checked_like_any_other(federation: Federation, kind: str, reason: str) -> None:
    for name in federation.names:
        federation.contribute(name, name)
    first = federation.names[0]
    place = federation.home / "inbox" / f"{first}.fed"
    sealed = read_sealed(place, max_bytes=10**9)
    upload = poisoned(kind, Payload.decode(sealed.part("upload")))
    key = SigningKey.load(federation.home / "homes" / first / "key.pem")
    place.write_bytes(seal(sealed.manifest, {"upload": upload.encode()}, key))
    with pytest.raises(FedfuseError, match=reason):
        federation.fuse()
    # Mended, the same command goes on.
    federation.contribute(first, first)
    assert federation.fuse().result is not None


def test_a_file_beyond_the_limit_is_not_read(federation: Federation) -> None:
    inbox = federation.home / "inbox"
    inbox.mkdir()
    with (inbox / "big.fed").open("wb") as file:
        file.truncate(10 << 30)
    (reason,) = refused(federation).values()
    assert "10,737,418,240 bytes are more than the limit of" in reason


def test_the_same_question_is_answered_from_what_was_kept(federation: Federation) -> None:
    first = federation.names[0]
    one = federation.contribute(first, "one")
    two = federation.contribute(first, "two")
    assert (one.from_earlier, two.from_earlier) == (False, True)
    inbox = federation.home / "inbox"
    assert (inbox / "one.fed").read_bytes() == (inbox / "two.fed").read_bytes()


def test_the_owner_sees_what_leaves_and_can_say_no(federation: Federation) -> None:
    first = federation.names[0]
    shown: list[str] = []

    def refuse(request: Any, rows: Any) -> bool:
        shown.extend(row.key for row in rows)
        return False

    with pytest.raises(UploadRefused, match="nothing was written: the owner said no"):
        federation.contribute(first, "x", approve=refuse)
    assert "num_examples" in shown
    with pytest.raises(UploadRefused, match='the upload holds "model/'):
        federation.contribute(first, "x", refuse=["model/*"])
    assert not (federation.home / "inbox" / "x.fed").exists()


def change_settings(manifest: dict[str, Any], name: str) -> None:
    manifest["requests"][name]["settings"]["local"]["num_epochs"] = 99


def change_client(manifest: dict[str, Any], name: str) -> None:
    manifest["requests"] = {"nobody": manifest["requests"][name]}


def change_fields(manifest: dict[str, Any], name: str) -> None:
    del manifest["requests"][name]["seed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_settings, "the request is for fedavg with other settings than were agreed on"),
        (change_client, '"client_0" is not asked by this request'),
        (change_fields, "the request is incomplete"),
    ],
)
def test_a_request_is_checked_by_the_client(
    tmp_path: Path, change: Callable[[dict[str, Any], str], None], message: str
) -> None:
    federation = Federation(tmp_path, num_rounds=2)
    for name in federation.names:
        federation.contribute(name, name)
    request = federation.fuse().request
    assert request is not None
    sealed = read_sealed(request, max_bytes=10**9)
    manifest = json.loads(json.dumps(sealed.manifest))
    change(manifest, "client_0")
    request.write_bytes(seal(manifest, sealed.parts, SigningKey.generate()))
    with pytest.raises(SealError, match=message):
        federation.contribute("client_0", "x", request=str(request))
    with pytest.raises(SealError, match="the request was signed by somebody else"):
        federation.contribute("client_0", "x", request=str(request), server_key=sealed.public_key)


def test_contributions_travel_by_url(federation: Federation) -> None:
    fsspec = pytest.importorskip("fsspec")
    for name in federation.names:
        contribute(
            federation.config,
            name,
            federation.home / "split" / f"{name}.npz",
            out=f"memory://bucket/{name}.fed",
            home=federation.home / name,
        )
    assert sorted(fsspec.filesystem("memory").ls("/bucket", detail=False)) == [
        f"/bucket/{name}.fed" for name in federation.names
    ]
    found = fuse_inbox(["memory://bucket"], federation.config, federation.home / "run")
    assert found.result is not None
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_what_a_client_needs_to_know_is_in_the_configuration(federation: Federation) -> None:
    table = yaml.safe_load((federation.home / "split" / "federation.yaml").read_text())
    table["data"]["test"]["path"] = "/nowhere/test.npz"
    # A client has neither the server's test set nor its data.
    assert agreement_of(read_config(table)).encode() == agreement_of(federation.config).encode()
    assert agreement_of(federation.simulation).encode() == agreement_of(federation.config).encode()


def test_clients_with_data_that_do_not_fit_are_told(federation: Federation, tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", x=np.zeros((5, 1, 4, 4), np.float32), y=np.arange(5))
    np.savez(tmp_path / "new.npz", x=np.zeros((5, 1, 8, 8), np.float32), y=np.array(["cat"] * 5))
    for file, message in (
        ("small.npz", r"inputs have shape \(1, 4, 4\) here and \(1, 8, 8\)"),
        ("new.npz", 'the label "cat" is none of the 10 classes'),
    ):
        with pytest.raises(FedfuseError, match=message):
            contribute(federation.config, "client_0", tmp_path / file, out=str(tmp_path / "x"), home=tmp_path / "home")
    with pytest.raises(ConfigError, match="nothing says where the data are"):
        own_data(federation.config, "client_0", None)
    with pytest.raises(ConfigError, match="the file's name does not tell how to read it"):
        own_data(federation.config, "client_0", tmp_path / "data.bin")


def test_a_client_has_a_home_of_its_own() -> None:
    assert default_home("hospital-a").parts[-2:] == (".fedfuse", "hospital-a")


def test_a_client_leaves_exactly_and_for_good(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    assert federation.carry().result is not None
    leaver = federation.names[1]
    facts = remove_client(tmp_path / "run", leaver)
    simulated = run({**TABLE, "data": {**TABLE["data"], "without": [leaver]}})
    assert facts["artifact"]["digest"] == simulated.facts["artifact"]["digest"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["artifact"] == facts["artifact"]
    owners = {json.loads(path.read_text())["client"] for path in (tmp_path / "run" / "journal").glob("*.json")}
    assert owners == set(federation.names) - {leaver}
    # Its file still lies in the inbox.
    again = federation.fuse()
    assert again.result is not None
    assert list(again.refused.values()) == [f'"{leaver}" was removed from this run']
    assert again.result.facts["artifact"]["digest"] == facts["artifact"]["digest"]
    with pytest.raises(ConfigError, match="the clients of this run come by themselves"):
        add_client(tmp_path / "run", leaver)
    with pytest.raises(ConfigError, match=f'there is no client "{leaver}"'):
        remove_client(tmp_path / "run", leaver)
