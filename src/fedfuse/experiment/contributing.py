"""A client's part of a federation by hand: answer a question from a configuration or a request, into a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedfuse.core.client import ClientSide, Request, perform
from fedfuse.core.cohort import ClientFacts, Cohort
from fedfuse.core.describing import UploadRow, refused_key, upload_rows
from fedfuse.core.errors import ConfigError, FedfuseError, SealError, UploadRefused
from fedfuse.core.examples import Examples
from fedfuse.core.files import remove_unfinished, write_atomically
from fedfuse.core.method import Job, Method
from fedfuse.core.registry import METHODS, SOURCES
from fedfuse.core.sealing import SigningKey, unseal
from fedfuse.core.seeding import Rng, derive_seed
from fedfuse.core.settings import from_json
from fedfuse.core.storage import is_url, read_file, write_file
from fedfuse.data.dataset import Dataset
from fedfuse.data.server import unlabelled
from fedfuse.experiment.agreement import Agreement, open_side
from fedfuse.experiment.configuration import Config, named, override
from fedfuse.experiment.setting import Loader
from fedfuse.runtimes.files import read_request, seal_contribution

_SUFFIXES = {".npz": "npz", ".csv": "csv", ".parquet": "parquet"}
_MAX_REQUEST_BYTES = 16 << 30


@dataclass(frozen=True)
class Contributed:
    """What ``contribute`` wrote.

    Args:
        place: path or URL of the file.
        request: the question that it answers.
        rows: what it holds, key by key.
        num_bytes: its size.
        public_key: of the client; the server's operator may want it for the list of clients.
        from_earlier: whether the answer had been computed before.
    """

    place: str
    request: Request
    rows: Sequence[UploadRow]
    num_bytes: int
    public_key: str
    from_earlier: bool


def contribute(
    config: Config | None,
    client_id: str,
    data: Dataset | Path | None = None,
    *,
    out: str,
    source: str = "",
    settings: Sequence[str] = (),
    request: str | None = None,
    home: Path,
    key: Path | None = None,
    server_key: str = "",
    refuse: Sequence[str] = (),
    device: str = "cpu",
    approve: Callable[[Request, Sequence[UploadRow]], bool] = lambda request, rows: True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Contributed:
    """Answer a question of a federation by hand, and write the answer as one signed file.

    Args:
        config: the federation's configuration; may be left out where there is a request.
        client_id: who answers.
        data: its data set, or where that is; left out, its part of the configuration's partition.
        out: path or URL of the file.
        source: name in the registry of sources; told by the path if left out.
        settings: ``key=value`` of that source.
        request: path or URL of the server's request; left out, the first question that the configuration asks.
        home: folder of what the client keeps from exchange to exchange.
        key: its signing key; ``key.pem`` in ``home`` if left out, made where it is missing.
        server_key: public key that the request must bear; any if empty.
        refuse: keys or ``group/*`` that must not leave.
        device: ``cpu`` or ``cuda``.
        approve: asked with the question and what would leave; saying no ends in an error.
        progress: called with (done, total) during long work.

    Returns:
        What was written.

    Raises:
        ConfigError: configuration, data or key cannot be used.
        SealError: the request cannot be used.
        UploadRefused: the client's own side failed, or its owner said no.
    """
    if config is None and request is None:
        raise ConfigError("nothing is asked", where="fedfuse contribute", fix="give a configuration or a --request")
    remove_unfinished(home)
    signing = SigningKey.load_or_make(key or home / "key.pem")
    sealed = None
    if request is not None:
        data_of_request = read_file(request, max_bytes=_MAX_REQUEST_BYTES)
        sealed = unseal(data_of_request, max_bytes=_MAX_REQUEST_BYTES)
        if server_key and sealed.public_key != server_key.lower():
            raise SealError(
                "the request was signed by somebody else", where=request, fix="ask the server's operator for its key"
            )
    agreement = (
        agreement_of(config) if config is not None else Agreement.decode(sealed.part("agreement") if sealed else b"")
    )
    dataset = data if isinstance(data, Dataset) else own_data(config, client_id, data, source, settings)
    side = open_side(agreement, client_id, dataset, home=home, device=device)
    facts = ClientFacts(
        signing.blinded(side.data.fingerprint), side.num_threads, side.device.type, len(side.data.train)
    )
    asked = first_request(agreement, client_id, facts) if sealed is None else read_request(sealed, client_id, facts)
    if (asked.method, dict(asked.settings)) != (agreement.method, dict(agreement.method_settings)):
        raise SealError(
            f"the request is for {asked.method} with other settings than were agreed on",
            where=request or "",
            fix="ask the server's operator which configuration holds",
        )
    declared = METHODS.get(asked.method).tasks()[asked.task].uploads
    sealed_bytes, is_old = _answer(asked, side, facts, signing, declared, home, progress)
    upload = unseal(sealed_bytes, max_bytes=len(sealed_bytes)).part("upload")
    rows = upload_rows(upload, declared)
    kept = refused_key(upload, list(refuse))
    if kept is not None or not approve(asked, rows):
        what = f'the upload holds "{kept}"' if kept is not None else "the owner said no"
        raise UploadRefused(f"nothing was written: {what}", where=client_id, fix="tell the server's operator")
    write_file(out, sealed_bytes)
    return Contributed(out, asked, rows, len(sealed_bytes), signing.public_key, is_old)


def _answer(
    request: Request,
    side: ClientSide,
    facts: ClientFacts,
    key: SigningKey,
    declared: Mapping[str, str],
    home: Path,
    progress: Callable[[int, int], None],
) -> tuple[bytes, bool]:
    """The sealed answer, and whether it was computed before: the same question is not worked on twice."""
    kept = home / "answers" / f"{request.answer_key}.fed"
    try:
        old = kept.read_bytes()
        if unseal(old, max_bytes=len(old)).text("answer_key") == request.answer_key:
            return old, True
    except (OSError, FedfuseError):
        pass
    reply = perform(request, side, progress)
    if reply.upload is None:
        raise UploadRefused(f"the task failed: {reply.error}", where=side.id, fix="mend it and run the command again")
    data = seal_contribution(request, reply, facts, key, declared=declared)
    write_atomically(kept, data)
    return data, False


def agreement_of(config: Config) -> Agreement:
    """The agreement of a configuration, on a machine that has neither the server's data nor its test set.

    Args:
        config: the federation's.
    """
    if config.data.source == "remote":
        table = config.model_dump()
        table["data"] = {**table["data"], "test": None, "server": None}
        bare = Config.model_validate(table)
    else:
        bare = config
    return Agreement.of(config, Loader(bare).setting(config.seed))


def own_data(
    config: Config | None, client_id: str, path: Path | None, source: str = "", settings: Sequence[str] = ()
) -> Dataset | Any:
    """A client's own data set; or its part of a simulation, to try things.

    Args:
        config: the federation's.
        client_id: the client.
        path: where its data are; left out, its part of the configuration's partition.
        source: name in the registry of sources; told by the path if left out.
        settings: ``key=value`` of that source.

    Raises:
        ConfigError: there are none.
    """
    if path is not None:
        table: dict[str, Any] = {"path": str(path)}
        for text in settings:
            table = override(table, text)
        with warnings.catch_warnings():
            # Nothing is tested on a client's data.
            warnings.filterwarnings("ignore", message=".*has no test part")
            loaded: Dataset = named(SOURCES, source or source_of_path(path), table, "--data", "source").load()
        return loaded
    if config is None or config.data.source == "remote":
        raise ConfigError("nothing says where the data are", where="--data", fix="give --data FILE_OR_FOLDER")
    clients = Loader(config).setting(config.seed).data.clients
    if client_id not in clients:
        raise ConfigError(
            f'the partition has no client "{client_id}"',
            where="--name",
            fix=f"give --data, or one of: {', '.join(clients)}",
        )
    return clients[client_id]


def source_of_path(path: Path) -> str:
    """How data at a path are read.

    Args:
        path: a file or a folder.

    Returns:
        Name in the registry of sources.

    Raises:
        ConfigError: the name does not tell.
    """
    if path.is_dir():
        return "parquet" if any(path.rglob("*.parquet")) else "image_folder"
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            "the file's name does not tell how to read it",
            where=str(path),
            fix=f"end it in {', '.join(_SUFFIXES)}, or give --source",
        )
    return _SUFFIXES[path.suffix]


class _FirstQuestion(Exception):
    def __init__(self, request: Request) -> None:
        self.request = request


class _Asked:
    """A runtime that only learns what is asked first."""

    def __init__(self, client_id: str, facts: ClientFacts) -> None:
        self._clients = {client_id: facts}

    def clients(self) -> Mapping[str, ClientFacts]:
        return self._clients

    def exchange(self, requests: Sequence[Request], **_: Any) -> Any:
        raise _FirstQuestion(requests[0])

    def close(self) -> None:
        pass


def first_request(agreement: Agreement, client_id: str, facts: ClientFacts) -> Request:
    """What the server will ask this client first, found by going through the server's procedure up to there.

    Args:
        agreement: what all sides hold alike.
        client_id: the client.
        facts: what the server will know of it.

    Raises:
        ConfigError: the method asks nothing.
    """
    method: Method = from_json(METHODS.get(agreement.method), agreement.method_settings, where="method")
    # Whoever needs data of the server's sees some: what is asked first does not depend on them.
    nothing = torch.zeros((1, *agreement.data.input_shape))
    job = Job(
        model=agreement.model,
        rng=Rng(derive_seed(agreement.seed, "server")),
        device=torch.device("cpu"),
        client_models=agreement.client_models,
        inputs=agreement.data.inputs,
        server_data=unlabelled(nothing) if not method.needs_server_data else Examples(nothing, torch.zeros(1).long()),
    )
    cohort = Cohort(
        runtime=_Asked(client_id, facts),
        method=method,
        model_of=agreement.model_of,
        seed=agreement.seed,
        releases=agreement.releases(),
        codec=agreement.upload,
    )
    try:
        with job.rng.ambient("fuse"):
            method.fuse(cohort, job)
    except _FirstQuestion as found:
        return found.request
    raise ConfigError(f"{method.name} asks its clients nothing", where="method", fix="choose another method")


def default_home(client_id: str) -> Path:
    """Where a client keeps what lasts, unless it says otherwise.

    Args:
        client_id: the client.
    """
    return Path.home() / ".fedfuse" / client_id


def check_out(place: str) -> str:
    """Refuse an output that is a folder.

    Args:
        place: path or URL.

    Raises:
        ConfigError: it is a folder.
    """
    if not is_url(place) and Path(place).is_dir():
        raise ConfigError("this is a folder", where=place, fix="name the file to write, for instance hospital-a.fed")
    return place
