"""Nobody attacks: what attacks are compared to."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse.core.registry import register_attack
from fedfuse.data.attacks.attack import Attack


@register_attack("none")
@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """All clients are honest."""
