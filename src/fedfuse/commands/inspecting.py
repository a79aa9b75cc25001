"""``fedfuse inspect``: what a file or folder holds, without running anything of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedfuse.commands.fusing_files import describe_adapter
from fedfuse.core.artifact import Artifact
from fedfuse.core.describing import upload_rows
from fedfuse.core.errors import ArtifactError, FedfuseError
from fedfuse.core.payload import PayloadFile
from fedfuse.core.sealing import read_sealed
from fedfuse.fusing.files import is_adapter
from fedfuse.report.units import in_words


def describe(path: Path) -> str:
    """Describe a run, a comparison, an artifact, an adapter, a journal, a payload's file, a contribution or a request.

    Args:
        path: the file or folder.

    Returns:
        Some lines of text.

    Raises:
        ArtifactError: there is nothing that fedfuse knows.
    """
    try:
        return _describe(path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            fix="run the command that made it again",
        ) from None


def _describe(path: Path) -> str:
    if path.is_file() and path.suffix == ".fed":
        return describe_sealed(path)
    if path.is_file() and path.suffix == ".safetensors":
        return describe_payload(path)
    if is_adapter(path):
        return describe_adapter(path)
    if (path / "fused.json").is_file():
        return describe_artifact(path)
    if (path / "board.json").is_file():
        return describe_board(path)
    if (path / "result.json").is_file():
        return describe_run(path)
    journal = path if path.name == "journal" else path / "journal"
    if journal.is_dir():
        return describe_journal(journal)
    raise ArtifactError(
        "there is nothing here that fedfuse knows",
        where=str(path),
        fix="name a run's folder, an artifact, an adapter, a journal, a .safetensors or a .fed file",
    )


def describe_payload(path: Path) -> str:
    """Keys, shapes and dtypes of an encoded payload.

    Args:
        path: a safetensors file.
    """
    upload = PayloadFile(path)
    lines = [f"payload {path}: {len(upload)} keys, {path.stat().st_size:,} bytes"]
    for key in upload:
        value = upload[key]
        what = (
            f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            if isinstance(value, torch.Tensor)
            else repr(value)[:80]
        )
        lines.append(f"  {key}  {what}")
    return "\n".join(lines)


def describe_sealed(path: Path) -> str:
    """Who sealed a contribution or a request, and what it holds; its signature and checksums are verified.

    Args:
        path: a file that ``fedfuse contribute`` or ``fedfuse fuse`` wrote.
    """
    sealed = read_sealed(path, max_bytes=path.stat().st_size)
    manifest = sealed.manifest
    lines = [f"{manifest.get('kind', 'message')} {path}: {path.stat().st_size:,} bytes, its signature fits"]
    lines.append(f"  signed by   {sealed.public_key}")
    for name in ("client", "method", "task", "exchange", "answer_key", "fedfuse"):
        if name in manifest:
            lines.append(f"  {name:<11} {manifest[name]}")
    for name, value in (manifest.get("facts") or {}).items():
        lines.append(f"  {name:<11} {value}")
    requests = manifest.get("requests")
    if isinstance(requests, Mapping):
        lines += [f"  asks        {client_id}: {asked.get('task')}" for client_id, asked in sorted(requests.items())]
    if "upload" in sealed.parts:
        declared = manifest.get("declared") or {}
        for row in upload_rows(sealed.part("upload"), declared):
            lines.append(f"  {row.key}  {row.kind} {row.shape}" + (f"  ({row.what})" if row.what else ""))
    return "\n".join(lines)


def describe_artifact(folder: Path) -> str:
    """What an artifact is and where it comes from; its digest is checked.

    Args:
        folder: the artifact's folder.
    """
    artifact = Artifact.read(folder)
    info = artifact.info
    count = sum(tensor.numel() for tensor in artifact.state.values())
    lines = [
        f"artifact {folder}",
        f"  model       {outline(artifact.recipe)}",
        f"  parameters  {count:,} numbers in {len(artifact.state)} tensors, {artifact.num_bytes:,} bytes",
        f"  digest      {artifact.digest()} (agrees with the content)",
    ]
    for name in ("method", "fedfuse", "input_shape", "class_names", "rule", "fused"):
        if name in info:
            lines.append(f"  {name:<11} {info[name]}")
    uploads: Mapping[str, Mapping[str, str]] = info.get("uploads", {})
    for exchange, by_client in uploads.items():
        lines.append(f"  from        {exchange}: " + ", ".join(f"{c} {digest[:8]}" for c, digest in by_client.items()))
    return "\n".join(lines)


def outline(recipe: Any) -> str:
    """A recipe in a few words.

    Args:
        recipe: JSON.
    """
    if not isinstance(recipe, Mapping):
        return str(recipe)
    kind = recipe.get("kind")
    if kind == "model":
        return f"{recipe.get('family')} {recipe.get('settings')}"
    if kind == "block":
        return f"block {recipe.get('index')} of {outline(recipe.get('of'))}"
    if kind == "normalized":
        return f"normalised input, then {outline(recipe.get('inner'))}"
    if kind == "ensemble":
        members = Counter(outline(member) for member in recipe.get("members", []))
        return f"ensemble by {recipe.get('combine')} of " + ", ".join(f"{n} x {what}" for what, n in members.items())
    if kind == "fused_blocks":
        levels = recipe.get("levels", [])
        columns = [len(level) for level in levels]
        whole = outline(levels[0][0]["block"].get("of")) if levels and levels[0] else "nothing"
        return f"{len(levels)} fused levels of {columns} columns ({whole}), head on {recipe.get('features')} features"
    # Whatever else there is holds its parts as recipes.
    parts = [part for value in recipe.values() for part in (value if isinstance(value, list) else [value])]
    inner = Counter(outline(part) for part in parts if isinstance(part, Mapping) and "kind" in part)
    return f"{kind}" + (" of " if inner else "") + ", ".join(f"{n} x {what}" for what, n in inner.items())


def describe_run(folder: Path) -> str:
    """The numbers of one run.

    Args:
        folder: the run's folder.
    """
    facts = _json(folder / "result.json")
    ledger = facts["ledger"]
    crossed = f"{ledger['upload_bytes']:,.0f} up, {ledger['download_bytes']:,.0f} down per client"
    accuracy = "no test set" if facts["accuracy"] is None else f"{facts['accuracy']:.2%}"
    lines = [
        f"run {folder}",
        f"  method      {facts['method']}, seed {facts['seed']}",
        f"  accuracy    {accuracy}",
        f"  clients     {len(facts['clients'])}" + (f", missing: {facts['missing']}" if facts["missing"] else ""),
        f"  bytes       {crossed} in {ledger['exchanges']} exchanges",
    ]
    codec = facts.get("config", {}).get("upload")
    if codec:
        told = [f"{name}: {value}" for name, value in sorted(codec.items()) if value != []]
        lines.append("  codec       " + ", ".join(told))
    if facts["artifact"]:
        lines.append(
            f"  artifact    {facts['artifact']['num_parameters']:,} parameters, digest {facts['artifact']['digest']}"
        )
    return "\n".join(lines)


def describe_board(folder: Path) -> str:
    """The rows of a comparison.

    Args:
        folder: the comparison's folder.
    """
    board = _json(folder / "board.json")
    num_methods = len({row["method"] for row in board["rows"]})
    lines = [f"comparison {folder}: {num_methods} methods, seeds {board['seeds']}"]
    setting = ""
    for row in board["rows"]:
        accuracy = "-" if row["accuracy_mean"] is None else f"{row['accuracy_mean']:.2%} +- {row['accuracy_std']:.2%}"
        found = in_words(row.get("varied", {}))
        if found != setting:
            setting = found
            lines.append(f"{setting}:")
        lines.append(f"  {row['method']:<30} {accuracy:<20} {row['upload_bytes']:>14,.0f} bytes up")
    return "\n".join(lines)


def describe_journal(folder: Path) -> str:
    """What a journal holds, by exchange; damaged entries are named.

    Args:
        folder: the journal's folder.
    """
    lines, damaged = [], []
    by_exchange: dict[str, list[tuple[str, int, float]]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            facts = _json(path)
            PayloadFile(path.with_suffix(".safetensors"))
            by_exchange.setdefault(facts["exchange"], []).append(
                (facts["client"], facts["upload_bytes"], facts["seconds"])
            )
        except (FedfuseError, OSError, KeyError, TypeError, ValueError):
            damaged.append(path.stem)
    lines.append(f"journal {folder}: {sum(map(len, by_exchange.values()))} replies")
    for exchange, replies in by_exchange.items():
        clients = len({client for client, _, _ in replies})
        lines.append(
            f"  {exchange:<20} {len(replies)} replies of {clients} clients, "
            f"{sum(r[1] for r in replies):,} bytes, {sum(r[2] for r in replies):.1f} s"
        )
    lines += [f"  damaged: {stem}" for stem in damaged]
    return "\n".join(lines)


def _json(path: Path) -> dict[str, Any]:
    fix = "run the command that made it again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot be read: {error}", where=str(path), fix=fix) from None
    if not isinstance(found, dict):
        raise ArtifactError("cannot be read: it is no table", where=str(path), fix=fix)
    return found
