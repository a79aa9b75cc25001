"""The section ``upload``: how uploads are said in fewer bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedfuse.core.coding import codec_terms

if TYPE_CHECKING:
    from fedfuse.experiment.sections import Config


def resolved_upload(config: Config) -> dict[str, Any]:
    """The section with its defaults, to be written into a run's configuration; empty where uploads are not coded.

    Args:
        config: the configuration.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    terms = codec_terms(config.upload)
    return {"upload": terms} if terms else {}


def in_words(terms: Mapping[str, Any]) -> str:
    """What a codec does, in one sentence for the report.

    Args:
        terms: as :func:`~fedfuse.core.coding.codec_terms` gives them.

    Returns:
        Empty where uploads are not coded.
    """
    if not terms:
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in terms.items() if name not in ("codec", "keys"))
    which = f" Only {', '.join(terms['keys'])}." if terms["keys"] else ""
    return f"Uploads were coded by {terms['codec']} ({settings}); bytes are counted as they crossed.{which}"
